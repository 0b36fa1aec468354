"""What a user types for a data set, taken apart: `[hf::|ms::]NAME[:SUBSET[/SUBSET]][#ROWS]`.

A path that exists is a path, whatever characters it holds. Nothing is looked up here but that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sftcore.data.folders import is_glob
from sftcore.errors import ConfigError

Kind = Literal["path", "stdin", "url", "glob", "hf", "ms", "name"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One data set as it was asked for.

    Attributes:
        kind: How `text` is to be read; `name` may still be a registered name or the id of a hub.
        text: The path, URL, pattern, id or name, without what follows.
        subsets: The subsets asked for; empty where none is.
        sample: The rows to draw; None for all.
    """

    kind: Kind
    text: str
    subsets: tuple[str, ...] = ()
    sample: int | None = None

    @property
    def shown(self) -> str:
        """What reports call it."""
        return ":".join([self.text, "/".join(self.subsets)]) if self.subsets else self.text


def parse_reference(text: str) -> Reference:
    """Takes a data set apart.

    Raises:
        ConfigError: It is empty, or what follows `#`, `::` or `:` is none of what may follow.
    """
    if not text.strip():
        raise ConfigError("a data set is an empty text; expected a file, a folder, a name or an id")
    if text == "-":
        return Reference(kind="stdin", text=text)
    if find_path(text):
        return Reference(kind="path", text=text)
    base, mark, number = text.rpartition("#")
    sample = None
    if mark:
        sample = _sample(text, number)
        if base == "-":
            return Reference(kind="stdin", text=base, sample=sample)
        if find_path(base):
            return Reference(kind="path", text=base, sample=sample)
    else:
        base = text
    if re.match(r"https?://", base, re.IGNORECASE):
        return Reference(kind="url", text=base, sample=sample)
    if scheme := _SCHEME.match(base):
        raise ConfigError(
            f"{text}: {scheme[0]} is not fetched from; expected http:// or https://, or a path of what is here"
        )
    if _DRIVE.match(base):
        return Reference(kind="path", text=base, sample=sample)
    prefix, mark, rest = base.partition("::")
    if mark:
        hub = prefix.lower()
        if hub not in ("hf", "ms"):
            raise ConfigError(f'{text}: "{prefix}::" is no hub; expected hf:: or ms::')
        name, subsets = _subsets(text, rest)
        if not _HUB_ID.fullmatch(name):
            raise ConfigError(f'{text}: "{name}" is no id of a hub; expected {hub}::owner/name')
        return Reference(
            kind="hf" if hub == "hf" else "ms", text=name, subsets=subsets, sample=sample
        )
    if is_glob(base):
        return Reference(kind="glob", text=base, sample=sample)
    name, subsets = _subsets(text, base)
    return Reference(kind="name", text=name, subsets=subsets, sample=sample)


def find_path(text: str) -> Path | None:
    """Returns the path of a file or folder that exists, `~` expanded, or None."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL, a user that is not there
        return None


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name`."""
    return text.count("/") == 1 and _HUB_ID.fullmatch(text) is not None


def _sample(text: str, number: str) -> int:
    if not (number.isascii() and number.isdigit() and len(number) <= 15 and int(number) > 0):
        raise ConfigError(
            f'{text}: "#{number}" draws no number of rows, and there is no file of this name; '
            "expected #N with N from 1, like #1000"
        )
    return int(number)


def _subsets(text: str, base: str) -> tuple[str, tuple[str, ...]]:
    name, mark, listed = base.partition(":")
    subsets = tuple(listed.split("/")) if mark else ()
    if mark and not all(subset.strip() for subset in subsets):
        raise ConfigError(
            f"{text}: a subset is missing; expected NAME:SUBSET or NAME:SUBSET/SUBSET"
        )
    return name, subsets
