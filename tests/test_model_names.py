"""One way to name a model: what the data side makes of each kind of name."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

from sftcore.cli import main
from sftcore.data import Encoder
from sftcore.data.model_names import near_folders, tokenizer_folder
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


def test_a_misspelt_folder_is_answered_with_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (10, 20, 300):
        (tmp_path / "out" / "v0" / f"checkpoint-{number}").mkdir(parents=True)
    (tmp_path / "out" / "v0" / "images").mkdir()
    (tmp_path / "out" / "v0" / "checkpoint-11").touch()  # a file
    monkeypatch.chdir(tmp_path)

    def near(name: str) -> list[str]:
        found = near_folders(name)
        return found.removeprefix("; did you mean the folder ").removesuffix("?").split(" or ")

    assert near("./out/v0/chekpoint-10")[0] == "./out/v0/checkpoint-10"
    assert near("out/v0/checkpoint-200")[0] == "out/v0/checkpoint-20"
    assert near("otu/v0/checkpoint-20") == ["out/v0/checkpoint-20"]
    assert near(f"{tmp_path}/out/v0/image") == [f"{tmp_path}/out/v0/images"]
    assert near("out/v0/../v0/image") == ["out/v0/../v0/images"]
    for name in ("out/v0/weights", "nothing/at/all", "out/v0", "/", "", "out/v0/checkpoint-11"):
        assert near_folders(name) == "", name


@pytest.mark.parametrize("command", ["train", "plan", "infer", "adapters", "merge", "resume"])
def test_every_command_names_the_near_folder(
    command: str, tmp_path: Path, rows: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoint-10").mkdir(parents=True)
    wrong = str(tmp_path / "out" / "chekpoint-10")
    train = ["train", "--dataset", str(rows), "--output_dir", str(tmp_path / "new")]
    words = {
        "train": [*train, "--model", wrong],
        "plan": ["plan", "--gpus", "1x24G", "--model", wrong],
        "infer": ["infer", "--prompt", "a", "--model", wrong],
        "adapters": ["infer", "--prompt", "a", "--adapters", wrong],
        "merge": ["merge", "--adapters", wrong],
        "resume": [
            *[*train, "--model", str(model), "--resume_from_checkpoint"],
            str(tmp_path / "oot" / "checkpoint-10"),
        ],
    }
    assert main(words[command]) != 0
    said = capsys.readouterr().err
    assert "there is no such folder; did you mean the folder" in said
    assert f"{tmp_path}/out/checkpoint-10?" in said


def test_a_file_that_is_no_model_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"model\.bin is a file, and no \.gguf file"):
        tokenizer_folder(tmp_path / "model.bin")
