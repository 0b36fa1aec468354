"""Which files hold rows, told by their names.

Paths, folders, globs and hubs all ask here, so that a file counts in one place just when it counts
in every other.
"""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath

TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
ROW_KINDS = (*TEXT_KINDS, ".parquet")
COMPRESSIONS = (".gz", ".zst")
# files of a known kind that tell of rows and hold none
_DESCRIPTIONS = {
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "package.json",
    "configuration.json",
    "license.txt",
    "readme.txt",
    "requirements.txt",
}


def kind_of(path: str | PurePath) -> str | None:
    """Returns the kind of a file of rows (`.jsonl` also for `.jsonl.gz`), or None for any other."""
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes[-2:]]
    if not suffixes:
        return None
    if suffixes[-1] in ROW_KINDS:
        return suffixes[-1]
    if len(suffixes) == 2 and suffixes[1] in COMPRESSIONS and suffixes[0] in TEXT_KINDS:
        return suffixes[0]
    return None


def why_left_out(name: PurePosixPath) -> str | None:
    """Returns why a file of a folder is not read, its path relative to that folder; None where it is."""
    if any(part.startswith(".") for part in name.parts):
        return "hidden"
    if name.name.lower() in _DESCRIPTIONS:
        return "describes a data set"
    if kind_of(name) is None:
        return "of no known kind"
    return None


def stem_of(name: str | PurePath) -> str:
    """Returns the name of a file without its folder, kind and compression."""
    path = PurePath(name)
    kinds = (*ROW_KINDS, *COMPRESSIONS)
    while path.suffix.lower() in kinds:
        path = path.with_suffix("")
    return path.name
