"""Where files are kept that a run makes for itself: converted models, downloads, filled data sets."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder for files that can be made again: `$SFTCORE_CACHE`, else the user's cache folder."""
    given = os.environ.get("SFTCORE_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sftcore"
