"""Fixtures: where the shared real data is, and small files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, templates and data files, which is not part of the repository."""
    given = os.environ.get("SFTCORE_SHARED")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder ({folder}); set SFTCORE_SHARED to it")
    return folder
