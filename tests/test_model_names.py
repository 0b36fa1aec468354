"""One way to name a model: what the data side makes of each kind of name."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from sftcore.data import Encoder
from sftcore.data.model_names import tokenizer_folder
from sftcore.errors import ConfigError


@pytest.fixture
def run_folder(shared_data: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints of adapters."""
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(shared_data / "tokenizers" / "minimind", tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "last").symlink_to("checkpoint-2")
    return tmp_path


def test_a_run_folder_stands_for_its_best_checkpoint_else_its_last(run_folder: Path) -> None:
    assert Encoder.from_pretrained(run_folder).folder.name == "checkpoint-2"
    (run_folder / "best").symlink_to("checkpoint-1")
    assert Encoder.from_pretrained(run_folder).folder.name == "checkpoint-1"
    assert Encoder.from_pretrained(run_folder / "last").vocab_size > 0


def test_a_name_that_is_none_lists_the_short_names() -> None:
    pytest.importorskip("torch")
    with pytest.raises(
        ConfigError, match=r"no such folder, and not one of the short names .*smollm2"
    ):
        Encoder.from_pretrained("no-such-model")


def test_without_the_packages_a_short_name_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"no {name}", name="torch")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(
        ConfigError, match=r'not installed \(torch\); run pip install "sftcore\[train\]"'
    ):
        tokenizer_folder("smollm2-135m")
