"""One run at a time in a run folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from sftcore.errors import ConfigError
from sftcore.train import run, train
from sftcore.train.lock import RunLock
from tiny_runs import config_of, make_model, make_rows


def test_a_second_run_writes_nothing_and_is_told_who_holds_the_folder(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", shared_data / "tokenizers" / "minimind")
    output = tmp_path / "output"
    config = config_of(model, make_rows(tmp_path / "rows.jsonl", 8), output, max_steps=1)
    opened_by = run.make_run_folder
    told: list[str] = []

    def make_run_folder(config: Any) -> Path:
        # between the look at the folder and the first file in it, another run takes it
        folder = opened_by(config)
        if not told:
            other = RunLock()
            other.hold(folder)
            before = {path: path.read_bytes() for path in output.rglob("*")}
            told.append("")
            with pytest.raises(ConfigError) as caught:
                train(config)
            told[0] = str(caught.value)
            assert {path: path.read_bytes() for path in output.rglob("*")} == before
            other.close()
        return folder

    monkeypatch.setattr(run, "make_run_folder", make_run_folder)
    train(config)
    who = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    assert told[0].startswith(f"{output} is in use by another run ({who}")
    assert told[0].endswith("(another --output_dir, or --add_version true)")
    assert {path.name for path in output.glob(".*")} == {".lock"}


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    first, second = RunLock(), RunLock()
    first.hold(tmp_path)
    first.hold(tmp_path)
    with pytest.raises(ConfigError, match="is in use by another run"):
        second.hold(tmp_path)
    second.close()
    with pytest.raises(ConfigError, match="is in use by another run"):
        second.hold(tmp_path)
    first.close()
    second.hold(tmp_path)
    second.close()


def test_a_file_system_without_locks_is_said_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("sftcore.train.lock.FileLock.acquire", refuse)
    lock = RunLock()
    lock.hold(tmp_path)
    lock.close()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: nothing keeps a second run out of {tmp_path}, as its file")
    assert list(tmp_path.iterdir()) == []
