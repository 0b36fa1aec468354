"""A folder or a glob to the files of rows in it, sorted by path.

What is not read (hidden, of no known kind) is named in one note, and a folder or glob without any
file of rows is an error.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from sftcore.data.kinds import COMPRESSIONS, ROW_KINDS, kind_of, why_left_out
from sftcore.errors import ConfigError

_KINDS = f"{', '.join(ROW_KINDS)}, and those of text also as {' or '.join(COMPRESSIONS)}"
_MOST_NAMED = 5


def list_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the files of rows of a folder and of all folders below it, and notes on the others.

    Raises:
        ConfigError: No file in it holds rows.
    """
    found: list[Path] = []
    left_out: list[tuple[str, str]] = []
    for path in sorted(_walk(folder), key=lambda path: path.relative_to(folder).parts):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        reason = why_left_out(name)
        if reason is None and not path.is_file():
            reason = "no regular file"
        if reason is None:
            found.append(path)
        else:
            left_out.append((str(name), reason))
    notes = _notes(str(folder), left_out, of=len(found) + len(left_out))
    if not found:
        seen = notes[0] if notes else f"{folder}: the folder is empty"
        raise ConfigError(f"{seen}; expected files of rows ({_KINDS})")
    return found, notes


def expand_glob(pattern: str) -> tuple[list[Path], list[str]]:
    """Returns the files of rows that a pattern with `*`, `?`, `[...]` or `**` matches, and notes on the others.

    Raises:
        ConfigError: It matches no file of rows.
    """
    try:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH111, PTH207
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{pattern}: not a pattern of paths: {error}") from error
    found: list[Path] = []
    left_out: list[tuple[str, str]] = []
    for path in (Path(match) for match in matches):
        if path.is_dir():
            # below ** a folder is matched beside the files in it
            if "**" not in pattern:
                left_out.append((str(path), "a folder; name it, or match what is in it"))
        elif (reason := why_left_out(PurePosixPath(path.name))) is None:
            found.append(path)
        else:
            left_out.append((str(path), reason))
    notes = _notes(pattern, left_out, of=len(found) + len(left_out))
    if not found:
        seen = notes[0] if notes else f"{pattern}: no file matches"
        raise ConfigError(f"{seen}; expected files of rows ({_KINDS})")
    return found, notes


def is_glob(text: str) -> bool:
    """Whether a text holds a character that makes it a pattern."""
    return any(character in text for character in "*?[")


def near_names(path: Path) -> list[str]:
    """Returns the names of files of rows beside a path that does not exist, for a suggestion."""
    try:
        with os.scandir(path.parent) as entries:
            return [entry.name for entry in itertools.islice(entries, 1000) if kind_of(entry.name)]
    except (OSError, ValueError):
        return []


def _walk(folder: Path) -> Iterable[Path]:
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        status = Path(parent).stat()
        # a link to a folder above it would go round for ever
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(parent) / name for name in names)


def _raise(error: OSError) -> None:
    raise error


def _notes(place: str, left_out: list[tuple[str, str]], *, of: int) -> list[str]:
    if not left_out:
        return []
    named = ", ".join(f"{name} ({reason})" for name, reason in left_out[:_MOST_NAMED])
    more = len(left_out) - _MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    return [f"{place}: {len(left_out)} of {of} files are left out: {named}{rest}"]
