"""Names of data sets to where their rows lie.

Names come from the packaged `datasets/registry.toml`, from `register_dataset`, and from files of the
user (`--dataset_info`). A name is found exactly first, then without regard to case and to `_` or `-`;
of two that are alike the user's goes before the packaged one.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGED = Path(__file__).parent.parent / "datasets" / "registry.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetEntry:
    """What is registered under one name.

    Attributes:
        name: The name.
        origin: Where it is registered: a file, or the word `register_dataset`.
        description: What the rows are, in a line.
        aliases: Other names of it.
        files: Files, folders, patterns or URLs; relative ones start at `folder`.
        folder: Where relative files start.
        hf_id: Its id on the Hugging Face hub.
        ms_id: Its id on the ModelScope hub.
        subset: The subsets that are read where none is asked for.
        subsets: The subsets that there are, where they are known.
        split: The split that is read; `all` for every one.
        hub_folder: The folder of the hub's repository that is read; None for all.
        columns: Keys of a row to the keys they stand for; `tags` may say how its messages are written.
        join: Keys of a row to texts that are put together of others, like `{"response": "{a} {b}"}`.
        language: The languages of the rows.
        license: The licence, where it is known.
        tags: What it is for, in single words.
        weight: Its share in a mix.
        sample: The rows that are drawn where no `#N` says so.
        fill_names: Whether `{{NAME}}` and `{{AUTHOR}}` in it are filled in.
        notes: What a user should know who trains on it.
    """

    name: str
    origin: str = "register_dataset"
    description: str = ""
    aliases: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folder: Path | None = None
    hf_id: str | None = None
    ms_id: str | None = None
    subset: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()
    split: str = "train"
    hub_folder: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    join: Mapping[str, str] = field(default_factory=dict)
    language: tuple[str, ...] = ()
    license: str = ""
    tags: tuple[str, ...] = ()
    weight: float | None = None
    sample: int | None = None
    fill_names: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_packaged(self) -> bool:
        """Whether its rows come with sftcore."""
        return self.folder == PACKAGED.parent


_TEXTS = ("description", "hf_id", "ms_id", "split", "hub_folder", "license")
_LISTS = ("aliases", "files", "subset", "subsets", "language", "tags", "notes")
ENTRY_KEYS = (*_TEXTS, *_LISTS, "columns", "join", "weight", "sample", "fill_names")


def make_entry(
    name: str, values: Mapping[str, Any], *, origin: str, folder: Path | None
) -> DatasetEntry:
    """Makes an entry of the values of a file or of code, all of which are checked.

    Raises:
        ConfigError: A key is unknown, a value is of the wrong type, or nothing says where the rows lie.
    """
    place = f'{origin}: data set "{name}"'
    if not name.strip() or any(mark in name for mark in "#:"):
        raise ConfigError(f"{place}: a name is not empty and has neither # nor :")
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in ENTRY_KEYS:
            raise ConfigError(
                f'{place}: unknown key "{key}"{did_you_mean(key, ENTRY_KEYS)} (known: {", ".join(ENTRY_KEYS)})'
            )
        if value is not None:
            given[key] = _check(place, key, value)
    entry = DatasetEntry(name=name, origin=origin, folder=folder, **given)
    if not (entry.files or entry.hf_id or entry.ms_id):
        raise ConfigError(f"{place} has no rows; expected files, hf_id or ms_id")
    for target, text in entry.join.items():
        joined_keys(text, place=f'{place}: join of "{target}"')
    return entry


def joined_keys(text: str, *, place: str) -> list[tuple[str, str | None]]:
    """Takes a text like `{output} so {answer}` apart, into literal text and the key after it.

    Raises:
        ConfigError: A brace does not name a key alone.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{place}: {text!r}: {error}; write {{{{ for a plain brace") from error
    for _, key, form, conversion in parts:
        if key is not None and (not key or form or conversion):
            raise ConfigError(
                f"{place}: {text!r}: expected names of keys in braces, like {{answer}}"
            )
    return [(literal, key) for literal, key, _, _ in parts]


class Registry:
    """All names that are known in one run."""

    def __init__(self, entries: Iterable[DatasetEntry]) -> None:
        """Takes entries, of which later ones go before earlier ones of the same name."""
        self._exact: dict[str, DatasetEntry] = {}
        self._folded: dict[str, DatasetEntry] = {}
        self._ids: dict[str, DatasetEntry] = {}
        self.entries: dict[str, DatasetEntry] = {}
        for entry in entries:
            self.entries[entry.name] = entry
            for name in (*entry.aliases, entry.name):
                self._exact[name] = entry
                self._folded[_fold(name)] = entry
            for hub_id in (entry.hf_id, entry.ms_id):
                if hub_id is not None:
                    # an id that two entries share says nothing of columns or subsets
                    self._ids.setdefault(hub_id.lower(), entry)

    def find(self, name: str) -> DatasetEntry | None:
        """Returns what is registered under a name or an alias."""
        return self._exact.get(name) or self._folded.get(_fold(name))

    def find_id(self, hub_id: str) -> DatasetEntry | None:
        """Returns what is registered with an id of a hub."""
        return self._ids.get(hub_id.lower())

    def names(self) -> list[str]:
        """Returns all names and aliases."""
        return list(self._exact)

    def search(self, words: Sequence[str]) -> list[DatasetEntry]:
        """Returns the entries that have all words somewhere, those with one in the name first."""
        wanted = [_fold(word) for word in words]
        found = []
        for entry in self.entries.values():
            names = _fold(" ".join((entry.name, *entry.aliases)))
            ids = (entry.hf_id or "", entry.ms_id or "")
            texts = (names, entry.description, *ids, *entry.language, *entry.tags, *entry.subsets)
            everything = _fold(" ".join(texts))
            if all(word in everything for word in wanted):
                found.append((not any(word in names for word in wanted), entry))
        return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


@cache
def packaged_entries() -> tuple[DatasetEntry, ...]:
    """Returns the entries that come with sftcore."""
    tables: dict[str, dict[str, Any]] = tomllib.loads(PACKAGED.read_text(encoding="utf-8"))
    return tuple(
        make_entry(name, values, origin="registry.toml", folder=PACKAGED.parent)
        for name, values in tables.items()
    )


_registered: dict[str, DatasetEntry] = {}


def registered_entries() -> tuple[DatasetEntry, ...]:
    """Returns the entries of `register_dataset`, in the order they came."""
    return tuple(_registered.values())


def register_dataset(
    name: str,
    *,
    files: str | Path | Sequence[str | Path] | None = None,
    hf_id: str | None = None,
    ms_id: str | None = None,
    subset: str | Sequence[str] | None = None,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    join: Mapping[str, str] | None = None,
    description: str = "",
    aliases: Sequence[str] = (),
    tags: Sequence[str] = (),
    weight: float | None = None,
    sample: int | None = None,
    replace_existing: bool = False,
) -> None:
    """Makes a name stand for a data set, in this process.

    Args:
        name: The name; it goes before a packaged one.
        files: Files, folders, patterns or URLs; relative ones start at the present folder.
        hf_id: Its id on the Hugging Face hub.
        ms_id: Its id on the ModelScope hub.
        subset: The subsets that are read where none is asked for.
        split: The split that is read; `all` for every one.
        columns: Keys of a row to the keys they stand for, like `{"ask": "query"}`.
        join: Keys to texts put together of others, like `{"response": "{output} {answer}"}`.
        description: What the rows are, in a line.
        aliases: Other names of it.
        tags: What it is for, in single words.
        weight: Its share in a mix.
        sample: The rows that are drawn where no `#N` says so.
        replace_existing: Whether it may take the place of one registered before.

    Raises:
        ConfigError: A value is wrong, or the name is registered.
    """
    listed = [files] if isinstance(files, str | Path) else list(files or ())
    values: dict[str, Any] = {
        "files": [str(file) for file in listed],
        "hf_id": hf_id,
        "ms_id": ms_id,
        "subset": list(subset) if isinstance(subset, tuple) else subset,
        "split": split,
        "columns": columns,
        "join": join,
        "description": description,
        "aliases": list(aliases),
        "tags": list(tags),
        "weight": weight,
        "sample": sample,
    }
    entry = make_entry(name, values, origin="register_dataset", folder=Path.cwd())
    if name in _registered and not replace_existing:
        raise ConfigError(
            f'data set "{name}" is registered already; pass replace_existing=True to put this in its place'
        )
    _registered[name] = entry


def _fold(name: str) -> str:
    return name.lower().replace("_", "-")


def _check(place: str, key: str, value: Any) -> Any:
    if key in _TEXTS:
        if isinstance(value, str):
            return value
        raise ConfigError(f"{place}: {key} is {value!r}; expected a text")
    if key in _LISTS:
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list) and all(isinstance(part, str) and part for part in listed):
            return tuple(listed)
        raise ConfigError(f"{place}: {key} is {value!r}; expected a text or a list of texts")
    if key == "weight":
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300:
            return float(value)
        raise ConfigError(f"{place}: weight is {value!r}; expected a number over 0")
    if key == "sample":
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        raise ConfigError(f"{place}: sample is {value!r}; expected a number of rows from 1")
    if key == "fill_names":
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{place}: fill_names is {value!r}; expected true or false")
    return check_columns(place, key, value, may_have_tags=key == "columns")


def check_columns(
    place: str, key: str, value: Any, *, may_have_tags: bool = False
) -> dict[str, Any]:
    """Returns a map of texts to texts, with `tags` as a map of its own where it may have them.

    Raises:
        ConfigError: It is of another kind.
    """
    if isinstance(value, Mapping):
        checked: dict[str, Any] = {}
        for name, part in value.items():
            if name == "tags" and may_have_tags and isinstance(part, Mapping):
                checked[name] = check_columns(place, f"{key}.tags", part)
            elif isinstance(name, str) and isinstance(part, str):
                checked[name] = part
        if len(checked) == len(value):
            return checked
    raise ConfigError(
        f'{place}: {key} is {value!r}; expected texts for texts, like {{"ask": "query"}}'
    )
