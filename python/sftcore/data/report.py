"""What the rows of a loader came to, in one dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sftcore.data.sources import DatasetSource

Counts = tuple[int, int, int, int]
_COUNTED = ("examples", "tokens", "trained_tokens", "longest")


def build_report(
    index: Mapping[str, Any],
    sources: Sequence[DatasetSource],
    *,
    split: Sequence[Counts],
    epoch: Sequence[Counts],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the report of a loader.

    Args:
        index: What the core counted while it indexed.
        sources: The data sets.
        split: Examples, tokens, trained tokens and the longest of each data set in the split.
        epoch: The same of the next epoch.
        extra: What the loader knows beside.
    """
    total = {name: value for name, value in index["total"].items() if name != "name"}
    notes = [note for source in sources for note in source.notes]
    sums = [sum(counts[place] for counts in split) for place in range(3)]
    return {
        **total,
        "notes": [*notes, *total["notes"]],
        "sets": index["sets"],
        "bad_reasons": dict(index["bad_reasons"]),
        "first_bad": index["first_bad"],
        "split_examples": sums[0],
        "split_tokens": sums[1],
        "split_trained_tokens": sums[2],
        "epoch": [
            {"name": source.name, **dict(zip(_COUNTED, counts, strict=True))}
            for source, counts in zip(sources, epoch, strict=True)
        ],
        **extra,
    }
