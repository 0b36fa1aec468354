"""What a run would do, found out without doing it: steps, tokens, padding, learning rates, memory and time.

In come the settings and the opened data; out goes a plan, as a dict and as text. Lengths and batches are read from the
index, memory is counted on a model without weights, and time is measured on a few micro-batches where the model is
here and small. Nothing is written but the file of `--dry_run_json`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from sftcore.config import TrainConfig
from sftcore.config.optimization import MEASURED
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import SftcoreError
from sftcore.models import load_settings
from sftcore.models.attention import Attention, choose_attention
from sftcore.models.dtypes import Dtypes, choose_dtypes
from sftcore.models.new_tokens import NewTokens
from sftcore.train.distributed import Engine
from sftcore.train.duration import find_time, is_cheap
from sftcore.train.estimate import BatchSize, Estimate, estimate_step
from sftcore.train.loaders import open_loaders
from sftcore.train.open import open_model, padded
from sftcore.train.optimizers import choose_optimizer
from sftcore.train.plan_text import describe_plan
from sftcore.train.schedule import count_steps
from sftcore.train.schedulers import learning_rates, warmup_note
from sftcore.train.speed import count_tokens, example_lengths

_STREAMED_BATCHES = 256
_POINTS_OF_SCHEDULE = 25


def without_files(config: TrainConfig) -> TrainConfig:
    """Returns the settings with nothing that would write beside the run folder."""
    if config.on_bad_row != "quarantine":
        return config
    return replace(config, on_bad_row="skip", quarantine=None)


def dry_run(
    config: TrainConfig,
    folder: Path,
    encoder: Encoder,
    loaders: tuple[BatchLoader | StreamLoader, BatchLoader | None],
    engine: Engine,
    new_tokens: NewTokens | None = None,
) -> dict[str, Any]:
    """Finds out what a run would do, prints it, and writes the file of `--dry_run_json` where one is asked for.

    Args:
        config: The settings.
        folder: The model; its weights need not be there.
        encoder: The encoder of the loaders.
        loaders: For training and, where there is some, for evaluation.
        engine: How the processes share the run.
        new_tokens: What is added to the tokenizer, if anything.

    Returns:
        `model`, `data`, `batches`, `steps`, `learning_rate`, `memory` (bytes), `time` (seconds) and `notes`.

    Raises:
        ConfigError: A setting does not fit the model or the machine.
    """
    settings = load_settings(folder, trust_remote_code=config.trust_remote_code)
    dtypes = choose_dtypes(config.torch_dtype, trains_weights=config.trains_weights)
    attention = choose_attention(config.attn_impl, settings, dtypes.compute, training=True)
    notes: list[str] = []
    opened = None
    if is_cheap(folder):
        opened = open_model(config, folder, engine, new_tokens)
        if opened.padding_reason:
            notes.append(f"examples do not share rows, as {opened.padding_reason}; they are padded")
            config = padded(config, engine.world.data_size)
            loaders = open_loaders(config, encoder, engine.world)
    elif config.packing or config.padding_free:
        notes.append(
            "whether this model keeps examples of one row apart is tried when the run starts"
        )
    loader, eval_loader = loaders
    shapes, lengths = _read_shapes(loader, notes)
    steps = count_steps(config, loader)
    total, per_epoch = steps.total, steps.per_epoch
    world_size = engine.world.data_size
    if warmup := warmup_note(config, total):
        notes.append(warmup.removeprefix("note: "))
    accumulation = config.accumulation_steps(world_size)
    batches = _describe_batches(shapes, lengths, accumulation)
    largest = batches["largest"]
    size = BatchSize(
        rows=largest["rows"], width=largest["width"], trained_tokens=largest["trained_tokens"]
    )
    estimate = None
    try:
        estimate = estimate_step(
            config,
            settings,
            size,
            dtypes=dtypes,
            attention=attention,
            optimizer=choose_optimizer(config),
            accumulates=accumulation > 1,
        )
        notes += estimate.notes
    except NotImplementedError as error:
        notes.append(
            f"no estimate of memory: this model cannot be run without its weights ({error})"
        )
    if not engine.runs_alone:
        notes.append(
            f"memory and time are those of the whole model on one process; {engine.name} shares them out"
        )
    slots = float(shapes[:, 1] @ shapes[:, 2]) / max(len(shapes), 1) * accumulation
    plan = {
        "model": _describe_model(config, dtypes, attention, estimate),
        "data": _describe_data(loader, eval_loader),
        "batches": batches,
        "steps": _describe_steps(shapes, total, per_epoch, accumulation, world_size),
        "learning_rate": _describe_rates(config, total),
        "memory": _describe_memory(config, estimate),
        "time": find_time(
            loader,
            opened if engine.runs_alone else None,
            config,
            dtypes,
            estimate,
            size,
            slots,
            total,
        ),
        "notes": notes,
    }
    _publish(plan, config)
    return plan


def _publish(plan: dict[str, Any], config: TrainConfig) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    as_json = json.dumps(plan, ensure_ascii=False, indent=2) + "\n"
    to_stdout = config.dry_run_json == "-"
    (sys.stderr if to_stdout else sys.stdout).write(describe_plan(plan) + "\n")
    if to_stdout:
        sys.stdout.write(as_json)
    elif config.dry_run_json:
        Path(config.dry_run_json).write_text(as_json, encoding="utf-8")


def _read_shapes(
    loader: BatchLoader | StreamLoader, notes: list[str]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns the micro-batches of an epoch as `BatchLoader.shapes` has them, and the lengths of its examples."""
    if isinstance(loader, BatchLoader):
        return loader.shapes(0), loader.lengths(0)
    # a stream has no index: its beginning stands for the rest
    rows: list[list[int]] = []
    lengths: list[int] = []
    for number, batch in enumerate(loader):
        counts = count_tokens(batch)
        shape = batch["input_ids"].shape
        rows.append([number, *shape, int(counts.tokens), int(counts.trained_tokens)])
        lengths += example_lengths(batch)
        if number + 1 == _STREAMED_BATCHES:
            break
    if not rows:
        raise SftcoreError("--dataset has no rows; expected at least one example")
    notes.append(
        f"the data is a stream: batches and lengths are those of its first {len(rows)} micro-batches"
    )
    return np.array(rows), np.array(lengths)


def _describe_model(
    config: TrainConfig, dtypes: Dtypes, attention: Attention, estimate: Estimate | None
) -> dict[str, Any]:
    return {
        "name": config.model,
        "tuner": config.tuner_type,
        "parameters": estimate and estimate.parameters,
        "trained_parameters": estimate and estimate.trained_parameters,
        "trained": estimate.trained_kinds if estimate else [],
        "optimizer": choose_optimizer(config).name,
        "dtype": str(dtypes.weights).removeprefix("torch."),
        "compute_dtype": str(dtypes.compute).removeprefix("torch."),
        "attention": attention.name,
        "attention_reason": attention.reason,
    }


def _describe_data(
    loader: BatchLoader | StreamLoader, eval_loader: BatchLoader | None
) -> dict[str, Any]:
    held_out = eval_loader.num_rows if eval_loader else 0
    if not isinstance(loader, BatchLoader):
        return {"rows": None, "examples": None, "eval_examples": held_out}
    report = loader.report
    epoch = report["epoch"]
    tokens = sum(part["tokens"] for part in epoch)
    trained = sum(part["trained_tokens"] for part in epoch)
    return {
        "rows": report["rows"],
        "files": report["files"],
        "examples": report["split_examples"],
        "eval_examples": held_out,
        "tokens_per_epoch": tokens,
        "trained_tokens_per_epoch": trained,
        "trained_share": trained / max(tokens, 1),
        "longest": report["longest"],
        "left_out": {
            name: report[name] for name in ("deleted", "bad", "duplicates") if report[name]
        },
        "sets": epoch,
    }


def _describe_batches(
    shapes: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], accumulation: int
) -> dict[str, Any]:
    slots = shapes[:, 1] * shapes[:, 2]
    # of batches with as many places, the one of the longest rows: attention grows with their square
    place = int(np.lexsort((shapes[:, 2], slots))[-1])
    step, rows, width, tokens, trained = (int(value) for value in shapes[place])
    return {
        "accumulation_steps": accumulation,
        "places": int(slots.sum()),
        "padding_share": 1 - float(shapes[:, 3].sum()) / max(float(slots.sum()), 1.0),
        "largest": {
            "step": step + 1,
            "rows": rows,
            "width": width,
            "tokens": tokens,
            "trained_tokens": trained,
        },
        "lengths": _histogram(lengths) if len(lengths) else None,
    }


def _histogram(lengths: np.ndarray[Any, Any], bins: int = 10) -> dict[str, Any]:
    """Returns how many examples have which length, in bins of a round number of tokens."""
    longest = int(lengths.max())
    width = _round_up(longest / bins)
    counts = np.bincount((lengths - 1) // width)
    median, ninth = np.percentile(lengths, (50, 95))
    return {
        "bin": width,
        "counts": counts.tolist(),
        "mean": float(lengths.mean()),
        "median": float(median),
        "percentile_95": float(ninth),
        "longest": longest,
    }


def _round_up(number: float) -> int:
    """Returns the next number of the kind 1, 2, 5, 10, 20, 50 ..., at least 1."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= number:
                return digit * power
        power *= 10


def _describe_steps(
    shapes: np.ndarray[Any, Any],
    total: int,
    per_epoch: int | None,
    accumulation: int,
    world_size: int,
) -> dict[str, Any]:
    micro_batches = total * accumulation
    mean = shapes.mean(axis=0)
    return {
        "total": total,
        "per_epoch": per_epoch,
        "epochs": total / per_epoch if per_epoch else None,
        "micro_batches_per_step": accumulation * world_size,
        "world_size": world_size,
        "tokens": round(micro_batches * mean[3] * world_size),
        "trained_tokens": round(micro_batches * mean[4] * world_size),
    }


def _describe_rates(config: TrainConfig, total: int) -> dict[str, Any]:
    """Returns the learning rate over the steps, at points that are evenly apart."""
    found: dict[str, Any] = {
        "highest": config.effective_learning_rate,
        "schedule": config.lr_scheduler_type,
        "warmup_steps": config.num_warmup_steps(total),
        "points": None,
    }
    if config.lr_scheduler_type in MEASURED:
        return found
    rates = learning_rates(config, total)
    places = np.unique(np.linspace(0, total - 1, min(total, _POINTS_OF_SCHEDULE)).round())
    found["points"] = [{"step": int(place) + 1, "rate": rates[int(place)]} for place in places]
    found["last"] = rates[-1]
    return found


def _describe_memory(config: TrainConfig, estimate: Estimate | None) -> dict[str, Any]:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        device = torch.cuda.get_device_name()
    else:
        memory = psutil.virtual_memory()
        free, total, device = int(memory.available), int(memory.total), "cpu"
    found: dict[str, Any] = {"device": device, "free": free, "total": total, "estimate": None}
    if estimate:
        parts = {
            name: getattr(estimate, name)
            for name in ("weights", "gradients", "optimizer", "activations", "loss", "peak")
        }
        on = config.gradient_checkpointing
        found["estimate"] = {
            **parts,
            "gradient_checkpointing": on,
            "peak_with_checkpointing": estimate.peak if on else estimate.peak_other,
            "peak_without_checkpointing": estimate.peak_other if on else estimate.peak,
            "fits": estimate.peak <= free,
        }
    return found
