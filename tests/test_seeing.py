"""What a run shows and leaves of itself: counts, bars, logs, curves, loggers, a run folder to start again from."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from rich.console import Console

from sftcore.config import TrainConfig, build, read_yaml
from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError, SftcoreError
from sftcore.train import train
from sftcore.train.curves import draw_curves, find_panels, smooth
from sftcore.train.log import append_line
from sftcore.train.loggers import choose_loggers
from sftcore.train.progress import ShowProgress, TrainingBar, describe_log, fit, short
from sftcore.train.speed import Counts, MeasureSpeed, count_tokens, example_lengths
from training import config_of, losses

LOG = {
    "loss": 1.23456,
    "grad_norm": 0.98765,
    "learning_rate": 9.8765e-05,
    "token_acc": 0.61234,
    "tokens_per_second": 123456.0,
    "trained_tokens_per_second": 45678.0,
    "padding_share": 0.1234,
    "data_wait_share": 0.4567,
    "seconds_per_step": 12.34,
    "memory_gib": 70.123,
    "eta_seconds": 12345.0,
    "epoch": 1.5,
}
STATE = SimpleNamespace(
    is_world_process_zero=True, global_step=1200, max_steps=10000, log_history=[]
)


@pytest.mark.parametrize(
    "layout",
    [{}, {"mode": "pack", "pack_length": 300}, {"padding_free": True}, {"tokens_per_batch": 600}],
)
def test_tokens_are_counted_as_the_index_has_them(
    model: Path, rows: Path, layout: dict[str, Any]
) -> None:
    size = {} if "tokens_per_batch" in layout else {"batch_size": 4}
    loader = BatchLoader(
        rows, Encoder.from_pretrained(model, max_length=300), return_rows=True, **size, **layout
    )
    counted, places, lengths, shapes = Counts(), 0, [], []
    for batch in loader:
        counted.add(count_tokens(batch))
        places += batch["input_ids"].numel()
        lengths += example_lengths(batch)
        shapes.append(list(batch["input_ids"].shape))
    (part,) = loader.report["epoch"]
    assert (counted.tokens, counted.examples) == (part["tokens"], part["examples"])
    assert counted.trained_tokens == part["trained_tokens"]
    assert counted.slots == places
    assert counted.rates()["padding_share"] == pytest.approx(1 - part["tokens"] / places)
    # the plan knows all of it without preparing a batch
    plan = loader.shapes(0)
    assert plan[:, 1:3].tolist() == shapes
    assert (plan[:, 3].sum(), plan[:, 4].sum()) == (counted.tokens, counted.trained_tokens)
    assert sorted(loader.lengths(0).tolist()) == sorted(lengths)


def test_waiting_is_told_from_working_and_from_evaluating() -> None:
    batch = {
        "labels": torch.tensor([[-100, 5, 6, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "rows": torch.tensor([0]),
    }

    def slow() -> Any:
        for _ in range(3):
            time.sleep(0.05)
            yield batch

    speed = MeasureSpeed()
    state = SimpleNamespace(max_steps=4, global_step=0)
    speed.on_train_begin(None, state, None)
    for _ in speed.watch(slow()):
        time.sleep(0.02)
        speed.on_step_end(None, state, None)
        time.sleep(0.2)
        speed.on_evaluate(None, state, None)
    state.global_step = 3
    logs = speed.take(lambda values: values, state)
    assert 0.5 < logs["data_wait_share"] < 0.85
    assert 0.07 <= logs["seconds_per_step"] < 0.15
    assert logs["padding_share"] == 0.25
    assert logs["trained_tokens_per_second"] == pytest.approx(logs["tokens_per_second"] * 2 / 3)
    # the step that is left takes its own time and its share of evaluation
    assert logs["eta_seconds"] > 0.25
    total = speed.summary(lambda values: torch.stack([values[0], values[0]]))
    assert (total["num_tokens"], total["num_trained_tokens"]) == (2 * 9, 2 * 6)
    assert total["seconds"] > 0.8 > total["train_seconds"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_the_bar_is_two_lines_of_any_width(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    bar = TrainingBar(10000, 1200)
    for logs in ({}, LOG, {**LOG, "loss": 12345.678, "padding_share": 1.0}):
        bar.logs = logs
        with console.capture() as capture:
            console.print(bar)
        lines = capture.get().splitlines()
        assert len(lines) == 2
        assert all(len(line) <= width for line in lines)
        assert "1,200/10,000" in lines[0]
        assert "ETA" in lines[0]


def test_a_terminal_of_80_columns_shows_every_number_that_counts() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    bar = TrainingBar(10000, 1200)
    bar.logs = LOG
    with console.capture() as capture:
        console.print(bar)
    text = capture.get()
    for shown in (
        "loss 1.2346",
        "lr 9.9e-05",
        "123k tok/s",
        "45.7k trained",
        "pad 12.3%",
        "wait 45.7%",
        "70.1 GiB",
        "ETA 3:25:45",
    ):
        assert shown in text
    assert "━" in text


def test_numbers_that_do_not_fit_are_left_out_last_ones_first() -> None:
    ranked = [(0, "loss 1"), (2, "speed 3"), (1, "rate 2")]
    assert fit(ranked, 100) == "loss 1  speed 3  rate 2"
    assert fit(ranked, 15) == "loss 1  rate 2"
    assert fit(ranked, 3) == "loss 1"
    assert [short(number) for number in (7.4, 9876, 12345, 999999, 2.5e6)] == [
        "7",
        "9,876",
        "12.3k",
        "1.0M",
        "2.5M",
    ]


def shown_by(progress: ShowProgress, stream: io.StringIO) -> str:
    progress.on_train_begin(None, STATE, None)
    progress.on_log(None, STATE, None, logs=LOG)
    progress.on_log(None, STATE, None, logs={"eval_loss": 1.5, "eval_runtime": 3.0})
    progress.on_step_end(None, STATE, None)
    progress.on_train_end(None, STATE, None)
    return stream.getvalue()


def test_lines_stand_where_there_is_no_terminal_or_none_is_wanted() -> None:
    for settings in ({"force_terminal": False}, {"force_terminal": True}):
        stream = io.StringIO()
        console = Console(file=stream, width=80, highlight=False, **settings)
        text = shown_by(ShowProgress(lines=settings["force_terminal"], console=console), stream)
        assert "\x1b" not in text
        log, evaluation = text.splitlines()
        assert log == f"step 1200/10000: {describe_log(LOG)}"
        assert evaluation == "step 1200/10000: eval loss 1.5"


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NO_COLOR", "1"), ("TERM", "xterm-256color"), ("FORCE_COLOR", "")):
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    progress = ShowProgress(lines=False)
    text = shown_by(progress, stream)
    assert "\x1b[3" not in text.replace("\x1b[?25", "")
    assert "\x1b[9" not in text
    assert "loss" in text


def test_a_log_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    append_line(path, {"step": 1, "loss": float("nan"), "名": "值"})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    append_line(path, {"step": 3, "loss": 0.5})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": "NaN", "名": "值"}
    assert json.loads(lines[-1]) == {"step": 3, "loss": 0.5}
    assert len(lines) == 3


def history() -> list[dict[str, Any]]:
    logs: list[dict[str, Any]] = []
    for step in range(1, 301):
        noise = (step * 7919 % 101) / 101 - 0.5
        logs.append(
            {
                "step": step,
                "loss": 0.8 + 2.2 * 0.985**step + 0.2 * noise,
                "loss/gsm8k": 0.7 + 2.0 * 0.985**step + 0.25 * noise,
                "loss/alpaca_zh_with_a_very_long_name_indeed": 1.1 + 2.4 * 0.99**step + 0.2 * noise,
                "token_acc": 0.8 - 0.4 * 0.985**step + 0.03 * noise,
                "grad_norm": (30 if step < 5 else 1.0) * (1 + 0.4 * noise),
                "learning_rate": 1e-4 * min(step / 20, 1 - (step - 20) / 300),
                "tokens_per_second": 5200 + 300 * noise,
                "trained_tokens_per_second": 2300 + 200 * noise,
                "padding_share": 0.012 + 0.004 * noise,
                "data_wait_share": 0.001 + 0.0005 * noise,
                "memory_gib": min(2 + step / 50, 3.1),
            }
        )
        if step % 50 == 0:
            logs.append({"step": step, "eval_loss": 0.9 + 2.0 * 0.985**step, "eval_runtime": 12.0})
            logs.append({"step": step, "eval_token_acc": 0.78, "eval_rouge-l": 0.2 + step / 1000})
    logs.append({"step": 300, "train_runtime": 12.0, "train_loss": 1.1})
    return logs


def test_curves_show_what_was_logged_and_nothing_else(tmp_path: Path) -> None:
    logs = history()
    panels = {panel.name: panel for panel in find_panels(logs)}
    assert list(panels) == [
        "loss",
        "token_acc",
        "learning_rate",
        "grad_norm",
        "throughput",
        "overheads",
        "memory",
        "loss_by_source",
        "evaluation",
    ]
    assert [curve.label for curve in panels["loss"].curves] == ["training", "evaluation"]
    assert panels["loss"].curves[1].steps == [50, 100, 150, 200, 250, 300]
    assert [curve.label for curve in panels["evaluation"].curves] == ["rouge-l"]
    files = draw_curves(logs, tmp_path / "images")
    assert [file.stem for file in files] == ["overview", *panels]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(
        file.name for file in files
    )
    short_run = find_panels([{"step": 1, "loss": float("nan"), "learning_rate": 0.1}])
    assert [panel.name for panel in short_run] == ["learning_rate"]
    assert draw_curves([], tmp_path / "nothing") == []
    assert not (tmp_path / "nothing").exists()


def test_smoothing_begins_at_the_first_value_and_keeps_a_constant() -> None:
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smooth([4.0, 0.0], 0.5) == pytest.approx([4.0, 4 / 3])


@pytest.fixture(scope="module")
def run(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory, pictures: Any) -> Any:
    """A run of four steps with everything that it leaves."""
    output = tmp_path_factory.mktemp("seen")
    config = config_of(
        model,
        rows,
        output,
        tuner_type="lora",
        add_version=True,
        split_dataset_ratio=0.1,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    with pictures():
        return SimpleNamespace(config=config, result=train(config))


def test_every_log_reaches_the_file_with_speed_and_memory(run: Any) -> None:
    folder = Path(run.result["output_dir"])
    lines = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    assert lines == run.result["log_history"]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for line in trained:
        assert 0 < line["trained_tokens_per_second"] < line["tokens_per_second"]
        assert 0 <= line["data_wait_share"] < 1
        assert 0 <= line["padding_share"] < 0.5
        assert 0.1 < line["memory_gib"] < 20
    assert trained[-1]["eta_seconds"] == 0 < trained[0]["eta_seconds"]
    speed = json.loads((folder / "result.json").read_text())["speed"]
    assert speed == run.result["speed"]
    assert speed["num_examples"] == 4 * 8
    seen = sum(part["tokens"] for part in run.result["data"]["epoch"])
    assert speed["num_tokens"] < seen
    assert 0 < speed["train_seconds"] < speed["seconds"]
    for name in ("overview", "loss", "learning_rate", "throughput", "memory"):
        assert (folder / "images" / f"{name}.png").stat().st_size > 5000


def test_a_run_folder_says_with_what_it_ran(run: Any) -> None:
    found = json.loads((Path(run.result["output_dir"]) / "environment.json").read_text())
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert {"sftcore", "transformers", "peft"} <= set(found["packages"])
    assert found["folder"] == str(Path.cwd())


def test_the_settings_of_a_run_start_the_very_same_run(run: Any, tmp_path: Path) -> None:
    path = Path(run.result["output_dir"]) / "args.yaml"
    config = build(TrainConfig, read_yaml(path), origin=str(path))
    assert config == run.config
    again = train(replace(config, output_dir=str(tmp_path)))
    assert losses(again) == losses(run.result)


def test_a_missing_logger_is_said_before_anything_is_loaded(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model, rows, tmp_path, report_to=["wandb", "mlflow"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--report_to wandb needs .* run pip install wandb"):
        train(config)
    names, note = choose_loggers(replace(config, report_to=["auto"]))
    assert names == []
    assert note is not None
    assert "pip install tensorboard" in note
    assert choose_loggers(replace(config, report_to=["none"])) == ([], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": ["wandb", "none"]}, "stands alone"),
        ({"report_to": ["tensorbord"]}, "did you mean tensorboard"),
        ({"run_name": "a"}, "has no effect"),
        ({"dry_run_json": "plan.json"}, "has no effect without --dry_run"),
        ({"test_oom": True, "dry_run": True}, "has no effect without a run"),
        ({"test_oom": True, "streaming": True, "max_steps": 1}, "needs an index"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="m", dataset=["d.jsonl"], **settings)


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def logged_run(
    model: Path, rows: Path, folder: Path, logger: str
) -> tuple[TrainConfig, dict[str, Any]]:
    config = config_of(
        model,
        rows,
        folder,
        max_steps=2,
        report_to=[logger],
        **({"project": "seen", "run_name": "first"} if logger != "tensorboard" else {}),
    )
    return config, train(config)


@pytest.mark.skipif(not has("tensorboard"), reason="needs the package tensorboard")
def test_tensorboard_has_every_number_of_every_step(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, result = logged_run(model, rows, tmp_path, "tensorboard")
    assert choose_loggers(replace(config, report_to=["auto"]))[0] == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    shown = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in shown] == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses(result), 1)
    ]
    scalars = set(events.Tags()["scalars"])
    for name in ("tokens_per_second", "padding_share", "memory_gib", "token_acc", "learning_rate"):
        assert f"train/{name}" in scalars
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "max_steps: 2" in text


@pytest.mark.skipif(not has("wandb"), reason="needs the package wandb")
def test_wandb_keeps_a_run_of_its_own_offline(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    logged_run(model, rows, tmp_path, "wandb")
    assert wandb.run is None
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert b"trained_tokens_per_second" in next(folder.glob("*.wandb")).read_bytes()


@pytest.mark.skipif(not has("mlflow"), reason="needs the package mlflow")
def test_mlflow_has_the_losses_and_the_settings(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    import mlflow

    _, result = logged_run(model, rows, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("seen")
    (found,) = client.search_runs([experiment.experiment_id])
    values = [metric.value for metric in client.get_metric_history(found.info.run_id, "loss")]
    assert sorted(values) == pytest.approx(sorted(losses(result)))
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["settings/max_steps"] == "2"


@pytest.mark.skipif(not has("swanlab"), reason="needs the package swanlab")
def test_swanlab_writes_into_the_run_folder_offline(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    logged_run(model, rows, tmp_path, "swanlab")
    files = [path for path in (tmp_path / "swanlog").rglob("*") if path.is_file()]
    assert any(b"tokens_per_second" in path.read_bytes() for path in files)


@pytest.mark.skipif(not has("trackio"), reason="needs the package trackio")
def test_trackio_has_the_losses(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the folder is read when the package is loaded
    script = (
        "import sys, json, pathlib; from sftcore.config import TrainConfig, build\n"
        "from sftcore.train import train\n"
        "train(build(TrainConfig, json.loads(sys.argv[1]), origin='test'))\n"
    )
    config = config_of(
        model, rows, tmp_path / "run", max_steps=2, report_to=["trackio"], project="seen"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run(
        [sys.executable, "-c", script, json.dumps(config.to_dict())], check=True, env=environment
    )
    (database,) = (tmp_path / "trackio").glob("seen*.db")
    assert b"trained_tokens_per_second" in database.read_bytes()


def test_a_logger_that_cannot_start_says_what_to_do(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftcore.train import loggers

    def refuse(self: Any, package: Any, step: int) -> None:
        raise PermissionError("no key")

    monkeypatch.setattr(loggers._TensorBoard, "begin", refuse)
    if not has("tensorboard"):
        pytest.skip("needs the package tensorboard")
    config = config_of(model, rows, tmp_path, max_steps=1, report_to=["tensorboard"])
    with pytest.raises(SftcoreError, match=r"--report_to tensorboard could not start .*no key"):
        train(config)
