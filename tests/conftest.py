"""Fixtures: where the shared real data is, and small files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

REPOSITORY = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests of several processes the time of all runs that the first of a file waits for."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Draws no curves of a run: they take longer than its few steps."""
    log = sys.modules.get("sftcore.train.log")
    if log is None:
        yield
        return
    with patch.object(log, "draw_curves", lambda history, folder: []):
        yield


@pytest.fixture(scope="session")
def pictures() -> Callable[[], AbstractContextManager[Any]]:
    """Makes a block whose runs draw their curves."""
    from sftcore.train import curves, log

    return lambda: patch.object(log, "draw_curves", curves.draw_curves)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, templates and data files, which is not part of the repository."""
    given = os.environ.get("SFTCORE_SHARED")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder ({folder}); set SFTCORE_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a small tokenizer, and the chat template of SmolLM2."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny_runs import make_model

    tokenizers = shared_data / "tokenizers"
    folder = make_model(tmp_path_factory.mktemp("model"), tokenizers / "minimind")
    own = folder / "tokenizer_config.json"
    other = json.loads((tokenizers / "smollm2" / own.name).read_text(encoding="utf-8"))
    config = json.loads(own.read_text(encoding="utf-8"))
    config["chat_template"] = other["chat_template"]
    own.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 real rows of at most 200 tokens."""
    path = shared_data / "datasets" / "gsm8k" / "train.jsonl"
    short = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) < 450]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(short[:64]), encoding="utf-8")
    return file
