"""Data sets as the core reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sftcore.data.sources import DatasetSource
from sftcore.errors import ConfigError

Dataset = str | Path | DatasetSource


def listed(dataset: Dataset | Sequence[Dataset]) -> list[Dataset]:
    """Returns data sets as a list, also where there is one."""
    return [dataset] if isinstance(dataset, str | Path | DatasetSource) else list(dataset)


def is_stdin(source: DatasetSource) -> bool:
    """Whether a data set is the standard input."""
    return any(str(path) == "-" for path in source.files)


def registered_shares(sources: Sequence[DatasetSource]) -> list[float] | None:
    """Returns the shares that data sets have of their own, where there are several and all have one.

    Raises:
        ConfigError: Some have one and others do not.
    """
    shares = [source.weight for source in sources if source.weight is not None]
    if len(sources) < 2 or not shares:
        return None
    if len(shares) < len(sources):
        without = ", ".join(source.name for source in sources if source.weight is None)
        raise ConfigError(
            f"some data sets have a weight and others ({without}) have none; give each one, or set --mix"
        )
    return shares


def specs_of(sources: Sequence[DatasetSource]) -> str:
    """Returns data sets as the core reads them."""
    return json.dumps(
        [
            {
                "name": source.name,
                "files": [str(path) for path in source.files],
                "sample": source.sample,
                "columns": dict(source.columns) or None,
            }
            for source in sources
        ]
    )


def digest(*parts: object) -> str:
    """Returns a short hash of values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
