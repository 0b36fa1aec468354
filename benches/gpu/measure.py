"""One training run of sftcore or TRL, measured: tokens a second, MFU, peak memory, waiting for data.

The device is waited for at the end of each step, so that a step's time is its own. The first steps are not counted.
"""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from train import Clock, callback_of
from transformers import TrainerCallback

from gpu.shapes import flops_of, make_model, on_gpu, peak_flops, random_weights
from sftcore.config import TrainConfig
from sftcore.data import Encoder
from sftcore.train import log, run, train
from sftcore.train.speed import MeasureSpeed, peak_memory
from sftcore.train.trainer import SftTrainer

# the first steps load kernels and fill the allocator; `train.Clock` leaves out as many
WARM_UP = 4
STEPS = 10 if on_gpu() else WARM_UP + 1


def wait() -> None:
    """Waits until the device has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()


class Exact(MeasureSpeed):
    """Counts a step when the device has ended it."""

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        """Counts a step."""
        wait()
        super().on_step_end(*arguments, **more)


def forget() -> None:
    """Gives back the memory of the run before, and begins a new peak."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def mean_length(folder: Path, rows: Path, max_length: int) -> float:
    """Returns the tokens of the example that the mean token is in."""
    encoder = Encoder.from_pretrained(folder, max_length=max_length)
    lengths = [len(encoder.encode(line).input_ids) for line in rows.read_text("utf-8").splitlines()]
    return sum(length**2 for length in lengths) / sum(lengths)


def settings_of(folder: Path, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Returns the settings of a short run, with `more` on top."""
    given: dict[str, Any] = {
        "model": str(folder),
        "dataset": [str(rows)],
        "output_dir": str(output),
        "add_version": False,
        "split_dataset_ratio": 0.0,
        "tuner_type": "lora",
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": ["none"],
    }
    if more.get("tuner_type", "lora") == "lora":
        given["lora_dropout"] = 0.0
    return {**given, **more}


def run_quietly(
    config: TrainConfig, watch: type[MeasureSpeed] = Exact, *, saves: bool = False
) -> dict[str, Any]:
    """Trains a model of random weights; returns what `train` does, and `attention`, the kernel that was taken.

    Args:
        config: The settings of the run.
        watch: What counts its steps.
        saves: Whether checkpoints are written; those of a whole model take longer than its steps.
    """
    forget()
    with ExitStack() as stack:
        made = stack.enter_context(random_weights())
        stack.enter_context(patch.object(run, "MeasureSpeed", watch))
        stack.enter_context(patch.object(log, "draw_curves", _nothing))
        if not saves:
            stack.enter_context(patch.object(SftTrainer, "_save_checkpoint", _nothing))
        result = train(config)
    return result | {"attention": made["attention"]}


def _nothing(*_: Any, **__: Any) -> None: ...


def losses_of(result: dict[str, Any]) -> list[float]:
    """Returns the losses that a run logged."""
    return [float(entry["loss"]) for entry in result["log_history"] if "loss" in entry]


def run_ours(folder: Path, rows: Path, work: Path, **more: Any) -> dict[str, Any]:
    """Trains as sftcore does; returns its rates, peak, share of waiting, and losses."""
    config = TrainConfig(**settings_of(folder, rows, work / "run", **more))
    result = run_quietly(config)
    logs = [entry for entry in result["log_history"] if "loss" in entry]
    timed = logs[WARM_UP:]
    assert timed, f"no step is timed: {len(logs)} steps, of which {WARM_UP} are not"
    seconds = sum(entry["seconds_per_step"] for entry in timed)

    def counted(rate: str) -> float:
        return sum(float(entry[rate] * entry["seconds_per_step"]) for entry in timed)

    proved = {proof["name"]: proof["outcome"] for proof in result["proved"]}
    return (
        {"attention": result["attention"], "proved": proved}
        | _figures(
            folder,
            steps=len(timed),
            seconds=seconds,
            tokens=counted("tokens_per_second"),
            trained=counted("trained_tokens_per_second"),
            waited=counted("data_wait_share"),
            length=mean_length(folder, rows, config.max_length),
            trains_all=config.tuner_type == "full",
        )
        | {"padding": timed[-1]["padding_share"], "losses": losses_of(result)}
    )


class _SyncedClock(Clock):
    def step(self) -> None:
        wait()
        super().step()


def run_trl(
    folder: Path,
    rows: Path,
    work: Path,
    *,
    max_length: int,
    attention: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Trains as TRL does, on the same rows and model; returns what `run_ours` does.

    Args:
        folder: Of the model.
        rows: Chats.
        work: The folder for what it writes.
        max_length: In tokens.
        attention: A kernel of Transformers; what it takes by itself where not given.
        more: Settings of TRL, on top of its defaults.
    """
    # not on every machine
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    forget()
    clock = _SyncedClock()

    class Timed(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            clock.count(inputs)
            return super().training_step(model, inputs, *rest)

    chats = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    given: dict[str, Any] = {
        "output_dir": str(work / "trl"),
        "max_length": max_length,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 2e-4,
        "bf16": on_gpu(),
        "use_cpu": not on_gpu(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        **more,
    }
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    model = make_model(folder, dtype, attention)
    trainer = Timed(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder),
        args=SFTConfig(**given),
        train_dataset=Dataset.from_list(chats),
        peft_config=LoraConfig(
            r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[callback_of(clock, TrainerCallback)],
    )
    trainer.train()
    found = clock.figures()
    losses = losses_of({"log_history": trainer.state.log_history})
    return (
        {"attention": model.config._attn_implementation}
        | _figures(
            folder,
            steps=found["steps"],
            seconds=found["seconds"],
            tokens=found["tokens"],
            trained=found["trained_tokens"],
            waited=found["waited"],
            length=mean_length(folder, rows, max_length),
            trains_all=False,
        )
        | {"padding": 1 - found["tokens"] / found["places"], "losses": losses}
    )


def _figures(
    folder: Path,
    *,
    steps: int,
    seconds: float,
    tokens: float,
    trained: float,
    waited: float,
    length: float,
    trains_all: bool,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokens_per_second": tokens / seconds,
        "trained_tokens_per_second": trained / seconds,
        "peak_gib": peak_memory() / 2**30,
        "data_wait_share": waited / seconds,
        "seconds_per_step": seconds / steps,
    }
    peak = peak_flops()
    if peak:
        flops = flops_of(
            folder,
            trains_all=trains_all,
            tokens=tokens,
            trained_tokens=trained,
            mean_length=length,
        )
        found["mfu"] = flops / seconds / peak
    return found
