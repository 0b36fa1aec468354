"""Which files of a hub's repository are the subset and the split that are wanted.

A repository is a list of paths. A folder or a file that says the split (`data/train-00000-of-00002.parquet`,
`train.jsonl`, `main/train/0000.parquet`) goes before all others; where paths leave open what is
meant, the error lists what there is. No file is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from sftcore.config.schema import did_you_mean
from sftcore.data.kinds import ROW_KINDS, kind_of, stem_of, why_left_out
from sftcore.errors import ConfigError

_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
_SHARD = re.compile(r"-\d{4,6}-of-\d{4,6}(-[0-9a-f]+)?$")
_NUMBER = re.compile(r"[-_.]?(part|shard)?[-_.]?\d{2,}$", re.IGNORECASE)
# of the same rows in several kinds, the first one here is read
_PREFERRED = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
_MOST_NAMED = 8


def choose_files(
    names: Iterable[str],
    *,
    origin: str,
    subsets: Sequence[str] = (),
    split: str = "train",
    folder: str | None = None,
) -> list[str]:
    """Returns the paths that hold the wanted rows, sorted.

    Args:
        names: All paths of the repository.
        origin: What the repository is called, for errors.
        subsets: The subsets that are wanted; `all` for every one; empty where there should be one alone.
        split: The split that is wanted; `all` for every one.
        folder: The folder that is looked into; None for all.

    Raises:
        ConfigError: Nothing fits, or more than one thing does.
    """
    paths = [PurePosixPath(name) for name in sorted(names)]
    known = [path for path in paths if not path.is_absolute() and why_left_out(path) is None]
    if folder is not None:
        known = [path for path in known if path.is_relative_to(folder.strip("/"))]
    if not known:
        inside = f" in {folder}" if folder else ""
        raise ConfigError(
            f"{origin} has no files of rows{inside} (found: {_shown(map(str, paths))}); expected "
            f"{', '.join(ROW_KINDS)}; a script that makes rows is never run"
        )
    asked = [subset for subset in subsets if subset not in ("all", "default")]
    wanted = known
    if asked:
        chosen = {path for subset in asked for path in _of_subset(known, subset, origin)}
        wanted = [path for path in known if path in chosen]
    if split != "all":
        wanted = _of_split(wanted, split, origin)
    if not subsets or list(subsets) == ["default"]:
        wanted = _of_one_group(wanted, split, origin)
    return [str(path) for path in _of_one_kind(wanted)]


def _of_subset(paths: list[PurePosixPath], subset: str, origin: str) -> list[PurePosixPath]:
    found = _saying(paths, subset)
    if found:
        return found
    there = sorted({_group(path) or _base(path) for path in paths} - {""})
    raise ConfigError(
        f'{origin} has no subset "{subset}"{did_you_mean(subset, there)} (found: {_shown(there)})'
    )


def _of_split(paths: list[PurePosixPath], split: str, origin: str) -> list[PurePosixPath]:
    found = _saying(paths, split)
    if found:
        return found
    of_others = {path for other in _SPLITS for path in _saying(paths, other)}
    unsaid = [path for path in paths if path not in of_others]
    if unsaid and split == "train":
        return unsaid
    raise ConfigError(
        f'{origin} has no split "{split}" (found: {_shown(map(str, paths))}); name files of it, or register it '
        "with the split that is wanted"
    )


def _of_one_group(paths: list[PurePosixPath], split: str, origin: str) -> list[PurePosixPath]:
    folders = {path: _group(path) for path in paths}
    paths = _alone(folders, origin)
    # a file that is called by its split alone says no more than its folder
    bases = {path: "" if _says(path, split, strictly=True) else _base(path) for path in paths}
    return _alone(bases, origin)


def _alone(groups: dict[PurePosixPath, str], origin: str) -> list[PurePosixPath]:
    names = sorted(set(groups.values()))
    if len(names) <= 1:
        return list(groups)
    if "default" in names:
        return [path for path, name in groups.items() if name == "default"]
    first = next(name for name in names if name)
    raise ConfigError(
        f"{origin} leaves open which of its files are meant: {_shown(map(str, groups))}; name some of them, like "
        f"{origin}:{first.rpartition('/')[2]}, or all with {origin}:all"
    )


def _of_one_kind(paths: list[PurePosixPath]) -> list[PurePosixPath]:
    kinds: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        kinds.setdefault(_same_rows(path), set()).add(kind_of(path) or "")
    return [
        path
        for path in paths
        if kind_of(path) == min(kinds[_same_rows(path)], key=_PREFERRED.index)
    ]


def _same_rows(path: PurePosixPath) -> tuple[str, str]:
    return (_group(path), _base(path))


def _saying(paths: list[PurePosixPath], word: str) -> list[PurePosixPath]:
    exactly = [path for path in paths if _says(path, word, strictly=True)]
    return exactly or [path for path in paths if _says(path, word, strictly=False)]


def _says(path: PurePosixPath, word: str, *, strictly: bool) -> bool:
    word = word.lower()
    said = [part.lower() for part in path.parts[:-1]]
    if strictly:
        stem = stem_of(path).lower()
        return word in (*said, path.name.lower(), stem, _SHARD.sub("", stem))
    return any(
        re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", part)
        for part in (*said, path.name.lower())
    )


def _group(path: PurePosixPath) -> str:
    """Returns the folders of a path that may stand for a subset."""
    return "/".join(part for part in path.parts[:-1] if part.lower() not in (*_SPLITS, "data"))


def _base(path: PurePosixPath) -> str:
    """Returns the name of a file without its kind and the number of its shard."""
    stem = stem_of(path)
    return _SHARD.sub("", stem) if _SHARD.search(stem) else _NUMBER.sub("", stem) or ""


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return (", ".join(listed[:_MOST_NAMED]) or "nothing") + more
