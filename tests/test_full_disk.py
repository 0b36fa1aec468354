"""A disk that is full while a checkpoint is written: an error that says so, and the checkpoints before it are good."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sftcore.errors import CheckpointError
from sftcore.train import checkpoints, train
from tiny_runs import config_of, contents, make_model, make_rows, names_in


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three optimizer steps an epoch, of four rows each."""
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)


def fail_at(name: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the disk full at the Nth call of a function that writes."""
    home, attribute = {
        "torch.save": (torch, "save"),
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
    }[name]
    original, calls = getattr(home, attribute), iter(range(1, 10_000))

    def fails(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **named)

    monkeypatch.setattr(home, attribute, fails)


@pytest.mark.parametrize(("name", "call"), [("torch.save", 6), ("fsync", 30), ("rename", 2)])
def test_a_full_disk_keeps_the_checkpoints_before(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    config = config_of(model, rows, tmp_path / "run", save_steps=1, save_total_limit=0)
    with monkeypatch.context() as patches:
        fail_at(name, call, patches)
        with pytest.raises(CheckpointError) as caught:
            train(config)
    found = names_in(tmp_path / "run")
    assert found == ["checkpoint-1"]
    assert re.search(
        rf"{tmp_path / 'run' / 'checkpoint-2'} could not be saved: No space left on device; it takes about [\d.]+ KiB, "
        r"and [\d.]+ [KMGT]iB are free there; the checkpoints before it are intact, the newest is checkpoint-1; make "
        "room, then pass --resume_from_checkpoint last",
        str(caught.value),
    )
    assert names_in(tmp_path / "run", ".*") == []
    assert checkpoints.find_fault(tmp_path / "run" / "checkpoint-1") is None
    train(replace(config, resume_from_checkpoint="last"))
    train(replace(config, output_dir=str(tmp_path / "whole")))
    assert contents(tmp_path / "run" / "checkpoint-6") == contents(
        tmp_path / "whole" / "checkpoint-6"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_disk_that_is_really_full_keeps_the_checkpoints_before(
    model: Path, rows: Path, small_disk: Path, tuner: str
) -> None:
    # three of four adapters fit; of the whole model, the weights fit once and the optimizer does not
    settings = {} if tuner == "lora" else {"lora_dropout": 0.05}
    config = config_of(
        model,
        rows,
        small_disk,
        tuner_type=tuner,
        save_steps=1,
        save_total_limit=0,
        max_steps=20,
        **settings,
    )
    with pytest.raises(CheckpointError, match="could not be saved"):
        train(config)
    found = checkpoints.list_checkpoints(small_disk)
    assert bool(found) == (tuner == "lora")
    assert [checkpoints.find_fault(folder) for folder in found.values()] == [None] * len(found)
    assert names_in(small_disk, ".*") == []


def test_a_file_beyond_the_limit_of_the_process_is_an_error_too(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = config_of(model, rows, tmp_path, tuner_type="full", lora_dropout=0.05)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(
            CheckpointError,
            match="there was none before it; make room, or pass another --output_dir",
        ):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == names_in(tmp_path, ".*") == []
