"""What the tests of data sets share: files to name, and one source at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftcore.data import DatasetSource, registry, resolve_sources

ROW = '{"query": "1 + 1?", "response": "2"}\n'


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of its own, a folder to stand in, no wish for a hub, and no names of other tests."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "USE_HF", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(registry, "_registered", {})


def write(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW, encoding="utf-8")


def one(dataset: str | Path | DatasetSource, **settings: Any) -> DatasetSource:
    (source,) = resolve_sources([dataset], **settings)
    return source


def files_of(dataset: str, **settings: Any) -> list[str]:
    return [path.as_posix() for path in one(dataset, **settings).files]


def info(content: Any, name: str = "info/data.json") -> list[str]:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return [name]
