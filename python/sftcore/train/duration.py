"""How long a run takes: measured on a few micro-batches where the model is here and small, else reckoned.

Evaluation, saving and the update of the optimizer are left out, and so is what a first step costs more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, StreamLoader
from sftcore.models.checkpointing import checkpointing_arguments
from sftcore.models.dtypes import Dtypes
from sftcore.train.estimate import BatchSize, Estimate
from sftcore.train.open import Opened

# a model of up to so many bytes of weights is loaded to measure its speed
_LOADED_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}
_MEASURED_SECONDS = 15.0
_MEASURED_BATCHES = 4
# of the speed of plain matrix products, what a training step reaches, about
_EFFICIENCY = 0.5


def is_cheap(folder: Path) -> bool:
    """Returns whether the weights are here, and few enough to be loaded for a measurement."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return 0 < weights <= _LOADED_BYTES[device]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Time:
    """What is found; None where nothing could be.

    Attributes:
        seconds_per_step: Of an optimizer step.
        seconds: Of all steps.
        how: How it was found.
        flops_per_step: Floating-point operations of a step.
    """

    seconds_per_step: float | None
    seconds: float | None
    how: str
    flops_per_step: float | None


def find_time(
    loader: BatchLoader | StreamLoader,
    opened: Opened | None,
    config: TrainConfig,
    dtypes: Dtypes,
    estimate: Estimate | None,
    size: BatchSize,
    slots_per_step: float,
    total: int,
) -> dict[str, Any]:
    """Returns `seconds_per_step`, `seconds`, `how` they were found and `flops_per_step`.

    Args:
        loader: The batches of the run.
        opened: The model, where it was loaded.
        config: The settings.
        dtypes: Those of the run.
        estimate: What a micro-batch needs, where that is known.
        size: That micro-batch.
        slots_per_step: The places of a step on this rank, padding included.
        total: All steps.
    """
    flops = None
    if estimate:
        flops = estimate.flops / (size.rows * size.width) * slots_per_step
    if opened and isinstance(loader, BatchLoader):
        per_slot, number = _measure(loader, opened, config, dtypes)
        step = per_slot * slots_per_step
        how = f"measured in {number} micro-batches on this machine"
    elif flops:
        rate = _product_rate(dtypes.compute)
        step = flops / (rate * _EFFICIENCY)
        how = (
            f"reckoned from {flops / 1e12:,.3g} TFLOP a step at half the {rate / 1e12:,.3g} TFLOP/s of plain matrix "
            "products on this machine"
        )
    else:
        return asdict(
            _Time(seconds_per_step=None, seconds=None, how="unknown", flops_per_step=None)
        )
    return asdict(_Time(seconds_per_step=step, seconds=step * total, how=how, flops_per_step=flops))


def _measure(
    loader: BatchLoader, opened: Opened, config: TrainConfig, dtypes: Dtypes
) -> tuple[float, int]:
    """Returns the seconds for each place of a batch, and how many micro-batches were timed."""
    model = opened.model
    model.train()
    if config.gradient_checkpointing:
        kind = checkpointing_arguments(config.gradient_checkpointing_kind)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    device = next(model.parameters()).device
    seconds, slots, timed = 0.0, 0, 0
    # the first is not timed: kernels and buffers are made in it
    for number, batch in enumerate(_typical_batches(loader)):
        on_device = {name: value.to(device) for name, value in batch.items()}
        _wait(device)
        begun = time.perf_counter()
        mixed = dtypes.weights != dtypes.compute
        with torch.autocast(device.type, dtype=dtypes.compute, enabled=mixed):
            losses, _ = opened.method.losses(model, on_device)
        (losses.total / max(1, len(losses.losses))).backward()  # type: ignore[no-untyped-call]
        _wait(device)
        taken = time.perf_counter() - begun
        if number or taken > _MEASURED_SECONDS:
            seconds, slots, timed = seconds + taken, slots + batch["labels"].numel(), timed + 1
        if timed == _MEASURED_BATCHES or seconds > _MEASURED_SECONDS:
            break
    model.zero_grad()
    return seconds / max(slots, 1), timed


def _typical_batches(loader: BatchLoader) -> Iterator[dict[str, Any]]:
    """Yields batches, again and again, whose size is about the median."""
    slots = loader.shapes(0)[:, 1:3].prod(axis=1)
    near = set(np.argsort(np.abs(slots - np.median(slots)))[: _MEASURED_BATCHES + 1].tolist())
    found = []
    loader.set_epoch(0)
    for number, batch in enumerate(loader):
        if number in near:
            found.append(batch)
            yield batch
        if number >= max(near):
            break
    while True:
        yield from found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(dtype: torch.dtype) -> float:
    """Returns the floating-point operations a second of plain matrix products on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = 4096 if device.type == "cuda" else 1024
    left = torch.randn(width, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    left @ right
    _wait(device)
    begun, number = time.perf_counter(), 0
    while number < 3 or time.perf_counter() - begun < 0.2:
        left @ right
        number += 1
    _wait(device)
    return 2 * width**3 * number / (time.perf_counter() - begun)
