"""Checkpoints: whole or not there, and a run that goes on from one equals the run that never stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from sftcore.config import TrainConfig
from sftcore.config.schema import build
from sftcore.errors import ConfigError, StoppedError
from sftcore.train import checkpoints, train
from sftcore.train.stopping import StopOnSignal
from sftcore.train.trainer import SftTrainer
from tiny_runs import config_of, contents, make_model, make_rows, names_in


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three optimizer steps an epoch, of four rows each."""
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends signals to this process when a method of the trainer is called for the Nth time."""

    def arm(method: str, call: int, *signals: signal.Signals) -> None:
        original, calls = getattr(SftTrainer, method), iter(range(1, 1000))

        def strikes(self: Any, *arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                for number in signals:
                    os.kill(os.getpid(), number)
            return original(self, *arguments, **named)

        monkeypatch.setattr(SftTrainer, method, strikes)

    return arm


def steps_logged(run: Path, key: str = "loss") -> list[int]:
    lines = (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if key in entry]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"tuner_type": "lora", "logging_steps": 4}, (1, 3, 5)),
        ({"tuner_type": "full", "lora_dropout": 0.05, "warmup_ratio": 0.5}, (2, 4)),
    ],
    ids=["lora", "full"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], steps: tuple[int, ...]
) -> None:
    whole = config_of(model, rows, tmp_path / "whole", save_steps=1, save_total_limit=0, **settings)
    assert train(whole)["global_step"] == 6
    expected = {step: contents(tmp_path / "whole" / f"checkpoint-{step}") for step in range(1, 7)}
    assert [expected[step]["epoch"] for step in (1, 3, 4, 6)] == pytest.approx([1 / 3, 1, 4 / 3, 2])
    for step in steps:
        # what matters is the checkpoint alone, not what lies beside it
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", run / f"checkpoint-{step}")
        train(replace(whole, output_dir=str(run), resume_from_checkpoint="last"))
        for later in range(step + 1, 7):
            assert contents(run / f"checkpoint-{later}") == expected[later], (step, later)


def test_last_goes_on_in_the_same_folder_and_nothing_stands_twice(
    model: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        model, rows, tmp_path, add_version=True, save_steps=1, save_total_limit=0, max_steps=4
    )
    run = Path(train(config)["output_dir"])
    expected = contents(run / "checkpoint-4")
    # the last one is cut short, the one before lacks a file: both would once have been gone on from
    with (run / "checkpoint-4" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    with (run / "logging.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    (run / ".checkpoint-5.tmp-saving" / "checkpoint-5").mkdir(parents=True)
    result = train(replace(config, resume_from_checkpoint="last"))
    said = capfd.readouterr().err
    assert (
        f"warning: passed over {run / 'checkpoint-4'}: adapter_model.safetensors has 1,000 bytes"
        in said
    )
    assert f"warning: passed over {run / 'checkpoint-3'}: optimizer.pt is missing" in said
    assert f"going on from {run / 'checkpoint-2'}, after step 2 of 4" in said
    assert result["output_dir"] == str(run)
    assert contents(run / "checkpoint-4") == expected
    assert steps_logged(run) == [1, 2, 3, 4]
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 4
    assert names_in(run / "set-aside") == ["checkpoint-3", "checkpoint-4"]
    assert names_in(run) == [f"checkpoint-{step}" for step in range(1, 5)]
    assert names_in(run, ".*") == []
    # all steps are there, so nothing is trained, and the same result comes back
    again = train(replace(config, resume_from_checkpoint="true"))
    assert "nothing is left to train" in capfd.readouterr().err
    assert again["last_model_checkpoint"] == result["last_model_checkpoint"]
    assert contents(run / "checkpoint-4") == expected


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda c: (c / "checkpoint.json").unlink(), "it has no checkpoint.json"),
        (lambda c: (c / "checkpoint.json").write_text("[]"), "its checkpoint.json cannot be read"),
        (lambda c: (c / "checkpoint.json").write_text("{}"), "its checkpoint.json cannot be read"),
        (lambda c: (c / "loader_state.json").unlink(), "loader_state.json is missing"),
        (
            lambda c: _scribble(c / "adapter_model.safetensors"),
            "adapter_model.safetensors is damaged",
        ),
        (lambda c: _scribble(c / "scheduler.pt", at_end=True), "scheduler.pt is damaged"),
        (lambda c: _scribble(c / "trainer_state.json"), "trainer_state.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_found(
    model: Path,
    rows: Path,
    tmp_path: Path,
    saved: Path,
    spoil: Callable[[Path], object],
    fault: str,
) -> None:
    damaged = tmp_path / "checkpoint-2"
    shutil.copytree(saved, damaged)
    assert checkpoints.find_fault(damaged) is None
    spoil(damaged)
    assert str(checkpoints.find_fault(damaged)).startswith(fault)
    for asked in (str(damaged), "last"):
        with pytest.raises(ConfigError, match=fault):
            train(config_of(model, rows, tmp_path, resume_from_checkpoint=asked))


def _scribble(path: Path, *, at_end: bool = False) -> None:
    """Overwrites some bytes in place, so that the size stays."""
    data = bytearray(path.read_bytes())
    data[slice(-64, None) if at_end else slice(0, 64)] = b"\xff" * 64
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two of six steps."""
    folder = tmp_path_factory.mktemp("saved")
    train(config_of(model, rows, folder, save_steps=2))
    shutil.copytree(folder / "checkpoint-4", folder / "kept" / "checkpoint-4")
    return folder / "kept" / "checkpoint-4"


def test_errors_say_what_was_looked_for_and_where(
    model: Path, rows: Path, tmp_path: Path, saved: Path
) -> None:
    def refused(text: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=re.escape(text)):
            train(config_of(model, rows, tmp_path, **settings))

    pattern = tmp_path / model.name / "v*-*" / "checkpoint-*"
    refused(
        f"found no checkpoint: there is no {pattern}",
        add_version=True,
        resume_from_checkpoint="last",
    )
    refused(
        f"no such folder; {saved.parent} has checkpoint-4",
        resume_from_checkpoint=str(saved.with_name("checkpoint-9")),
    )
    refused("has no checkpoint.json", resume_from_checkpoint=str(model))
    shutil.copytree(saved, tmp_path / "checkpoint-4")
    refused(f"{tmp_path} has checkpoint-4 of an earlier run")
    refused(f"{tmp_path} has checkpoint-4 of an earlier run", resume_from_checkpoint=str(saved))
    elsewhere = {"resume_from_checkpoint": str(saved), "output_dir": str(tmp_path / "new")}
    refused("--optim is sgd, and was auto at", optim="sgd", **elsewhere)
    refused("--lora_rank is 4, and was 8 at", lora_rank=4, **elsewhere)
    refused("the seed, the global batch size", gradient_accumulation_steps=3, **elsewhere)
    assert not (tmp_path / "new").exists()
    for settings, needed in (
        ({"ignore_data_skip": True}, "--resume_only_model true"),
        ({"resume_only_model": True}, "--resume_from_checkpoint"),
        ({"save_steps": 3, "save_strategy": "epoch"}, "--save_strategy steps"),
    ):
        refused(f"has no effect without {needed}", **settings)
    refused("--save_strategy best follows an evaluation", save_strategy="best")


def test_a_changed_learning_rate_is_said_and_counts(
    model: Path, rows: Path, tmp_path: Path, saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(model, rows, tmp_path, resume_from_checkpoint=str(saved))
    changed = replace(
        config,
        learning_rate=3e-2,
        weight_decay=0.5,
        lr_scheduler_type="linear",
        save_steps=1,
        save_total_limit=0,
    )
    history = train(changed)["log_history"]
    said = capfd.readouterr().err
    for text in (
        "--learning_rate is 0.03, and was 0.01",
        "--weight_decay is 0.5, and was 0.1",
        "--lr_scheduler_type is linear, and was cosine",
    ):
        assert f"warning: {text}" in said
    # saving each step, where each second one was saved before
    assert names_in(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    # Transformers logs the rate that the step was made with; that of step 5 is the first after the checkpoint
    assert (rates[5], rates[6]) == pytest.approx((3e-2 * 2 / 6, 3e-2 * 1 / 6))
    groups = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)[
        "param_groups"
    ]
    assert 0.5 in {group["weight_decay"] for group in groups}


def test_only_the_model_is_taken_where_that_is_asked(
    model: Path, rows: Path, tmp_path: Path, saved: Path
) -> None:
    asked = {"resume_from_checkpoint": str(saved), "resume_only_model": True}
    config = config_of(model, rows, tmp_path / "place", optim="sgd", **asked)
    history = train(config)["log_history"]
    new = [entry["step"] for entry in history if "loss" in entry][-2:]
    assert new == [5, 6]
    expected = [entry for entry in history if entry["step"] in (4, 5, 6) and "loss" in entry]
    # the schedule goes on; the momentum of AdamW does not
    assert expected[1]["learning_rate"] < expected[0]["learning_rate"]
    optimizer = torch.load(tmp_path / "place" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert not any(optimizer["state"].values())
    weights = config_of(
        model, rows, tmp_path / "weights", ignore_data_skip=True, max_steps=1, **asked
    )
    result = train(weights)
    assert result["global_step"] == 1
    first = next(entry["loss"] for entry in history if "loss" in entry)
    assert (
        result["log_history"][0]["loss"] != first
    )  # the rows of step 1, but no longer an untrained model
    assert len((tmp_path / "weights" / "ledger.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_of_the_model_only_is_small_and_said_to_be_so(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    config = config_of(model, rows, tmp_path, save_only_model=True, save_steps=2, max_steps=3)
    train(config)
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth"} & {
        path.name for path in (tmp_path / "last").iterdir()
    }
    resumed = replace(config, resume_from_checkpoint="last", max_steps=4)
    with pytest.raises(ConfigError, match="was saved with --save_only_model"):
        train(resumed)
    assert train(replace(resumed, resume_only_model=True))["global_step"] == 4


def evaluate_as(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Makes each evaluation come to the next of some losses; one too many is an error."""
    rest = iter(losses)

    def evaluate(*_: Any, **__: Any) -> EvalLoopOutput:
        metrics = {"eval_loss": next(rest)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=3)

    monkeypatch.setattr(SftTrainer, "evaluation_loop", evaluate)


def test_links_name_the_best_and_the_last_checkpoint_which_rotation_keeps(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    evaluate_as(monkeypatch, [3.0, 1.0, 2.0, 2.5, 2.2, 2.1])

    def settle(self: Any, step: int, best: str | None) -> None:
        original(self, step, best)
        seen.append(
            (
                names_in(tmp_path),
                str((tmp_path / "best").readlink()),
                str((tmp_path / "last").readlink()),
            )
        )

    original = checkpoints.Checkpoints.settle
    monkeypatch.setattr(checkpoints.Checkpoints, "settle", settle)
    validation = make_rows(tmp_path.parent / "validation.jsonl", 3)
    config = config_of(
        model,
        rows,
        tmp_path,
        save_steps=1,
        save_total_limit=2,
        val_dataset=[str(validation)],
        overlap="none",
    )
    result = train(config)
    assert seen[:2] == [
        (["checkpoint-1"], "checkpoint-1", "checkpoint-1"),
        (["checkpoint-1", "checkpoint-2"], "checkpoint-2", "checkpoint-2"),
    ]
    for step in range(3, 7):
        assert seen[step - 1] == (
            ["checkpoint-2", f"checkpoint-{step}"],
            "checkpoint-2",
            f"checkpoint-{step}",
        )
    assert len(seen) == 6
    assert result["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()


def test_where_links_cannot_be_made_it_is_said_once(
    model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    train(config_of(model, rows, tmp_path, save_steps=1, max_steps=3))
    assert capfd.readouterr().err.count("note: no links to the best and the last checkpoint") == 1
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(
    ("strategy", "losses", "expected"),
    [
        ("epoch", [3.0, 2.0], ["checkpoint-3", "checkpoint-5"]),
        ("no", [3.0, 2.0], ["checkpoint-5"]),
        ("best", [3.0, 1.0, 2.0, 4.0, 5.0], ["checkpoint-1", "checkpoint-2", "checkpoint-5"]),
    ],
)
def test_each_strategy_saves_when_it_says_and_once_at_the_end(
    model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    losses: list[float],
    expected: list[str],
) -> None:
    evaluate_as(monkeypatch, losses)
    saves = []
    original = SftTrainer._save_checkpoint

    def save(self: Any, *arguments: Any) -> None:
        saves.append(f"checkpoint-{self.state.global_step}")
        original(self, *arguments)

    monkeypatch.setattr(SftTrainer, "_save_checkpoint", save)
    settings: dict[str, Any] = {"save_total_limit": 2 if strategy == "no" else 0}
    if strategy == "best":
        validation = make_rows(tmp_path / "validation.jsonl", 3)
        settings |= {"val_dataset": [str(validation)], "overlap": "none", "eval_steps": 1}
    train(config_of(model, rows, tmp_path, save_strategy=strategy, max_steps=5, **settings))
    assert saves == expected
    assert names_in(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_leaves(
    model: Path, rows: Path, tmp_path: Path, strike: Callable[..., None], number: signal.Signals
) -> None:
    config = config_of(model, rows, tmp_path / "run", save_steps=5)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    # in the first micro-batch of step 2
    strike("training_step", 3, number)
    with pytest.raises(StoppedError, match=f"stopped by {number.name} after step 2 of 6") as caught:
        train(config)
    assert caught.value.exit_code == 128 + number
    assert caught.value.checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert [
        signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ] == handlers
    assert names_in(tmp_path / "run") == ["checkpoint-2"]
    train(replace(config, resume_from_checkpoint="auto"))
    train(replace(config, output_dir=str(tmp_path / "whole"), resume_from_checkpoint="auto"))
    assert contents(tmp_path / "run" / "checkpoint-6") == contents(
        tmp_path / "whole" / "checkpoint-6"
    )


def test_a_signal_that_comes_while_processes_agree_counts_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping, came = StopOnSignal(world_size=2), [signal.SIGUSR1, signal.SIGTERM]
    seen: list[list[int]] = []

    def all_reduce(values: Any, *_: Any) -> None:
        seen.append(values.tolist())
        if came:
            stopping._receive(came.pop(), None)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    arguments, state = SimpleNamespace(device="cpu"), TrainerState()
    asked = []
    for _ in range(3):
        control = TrainerControl()
        stopping.on_step_end(arguments, state, control)
        asked.append((control.should_save, control.should_training_stop))
    # all processes must do the same: what came after the values were told is of the next step
    assert seen == [[0, 0], [signal.SIGTERM, 0], [signal.SIGTERM, 1]]
    assert asked == [(False, False), (True, True), (True, True)]


def test_a_warning_of_slurm_saves_and_the_run_goes_on(
    model: Path, rows: Path, tmp_path: Path, strike: Callable[..., None]
) -> None:
    strike("training_step", 3, signal.SIGUSR1)
    result = train(config_of(model, rows, tmp_path, save_steps=5, save_total_limit=0))
    assert result["global_step"] == 6
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]


def test_an_evaluation_under_way_is_left_and_made_up_for(
    model: Path,
    rows: Path,
    tmp_path: Path,
    strike: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validation = make_rows(tmp_path / "validation.jsonl", 5)
    config = config_of(
        model,
        rows,
        tmp_path / "run",
        save_steps=2,
        eval_steps=1,
        val_dataset=[str(validation)],
        overlap="none",
        per_device_eval_batch_size=1,
    )
    expected = train(replace(config, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context():
        strike("evaluation_loop", 3, signal.SIGTERM)
        with pytest.raises(StoppedError, match="after step 3 of 6"):
            train(config)
    assert steps_logged(tmp_path / "run", "eval_loss") == [1, 2]
    result = train(replace(config, resume_from_checkpoint="last"))
    assert steps_logged(tmp_path / "run", "eval_loss") == [1, 2, 3, 4, 5, 6]

    def evaluations(result: dict[str, Any]) -> list[Any]:
        return [
            (entry["step"], entry["eval_loss"])
            for entry in result["log_history"]
            if "eval_loss" in entry
        ]

    assert evaluations(result) == evaluations(expected)
    assert result["best_metric"] == expected["best_metric"]


def test_yaml_and_flags_name_the_settings_of_transformers() -> None:
    values = {
        "model": "m",
        "dataset": "d",
        "save_strategy": "epoch",
        "save_total_limit": 0,
        "save_only_model": True,
        "create_checkpoint_symlink": False,
        "resume_from_checkpoint": "false",
    }
    config = build(TrainConfig, values, origin="test")
    assert not config.resumes
    assert build(TrainConfig, config.to_dict(), origin="test") == config
