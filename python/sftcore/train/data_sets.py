"""The data sets of a run by the names that its logs show.

A data set that is a file is named by its path; in a log that would be long, and other on each machine.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

from sftcore.data import BatchLoader


def shown_names(loader: BatchLoader) -> dict[str, str]:
    """Returns the data sets of a loader, in its order, each with the name that logs show.

    Of a path that is the name of the file without its ending, or with as many folders before it as tell
    it from the others.
    """
    names = list(dict.fromkeys(part["name"] for part in loader.report["epoch"]))
    shown = {name: _tail(name, 1) for name in names}
    depth = 1
    while len(set(shown.values())) < len(names):
        depth += 1
        counts = Counter(shown.values())
        longer = {name: _tail(name, depth) for name in names if counts[shown[name]] > 1}
        if all(longer[name] == shown[name] for name in longer):
            return {name: name for name in names}
        shown |= longer
    return shown


def _tail(name: str, depth: int) -> str:
    """Returns the last parts of a path without the ending of the file; any other name as it is."""
    path = PurePath(name)
    if not path.suffix and not path.is_absolute():
        return name
    parts = [part for part in path.parts if part != path.anchor][-depth:]
    if not parts:
        return name
    return "/".join([*parts[:-1], parts[-1].split(".")[0] or parts[-1]])
