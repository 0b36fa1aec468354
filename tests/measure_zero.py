"""One process of several in a test: what DeepSpeed keeps on this rank, in bytes, for each of some settings.

    torchrun --nproc_per_node 2 tests/measure_zero.py RUNS.json

Gradients are measured between two micro-batches of a step, and where they are sharded, as the optimizer takes them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from sftcore.config import TrainConfig
from sftcore.models.shapes import full_size
from sftcore.program import run_program
from sftcore.train import train

found: dict[str, int] = {}


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in tensors_in(part)] if isinstance(value, list) else []


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors; what lies in another one of them counts once."""
    spans = sorted(
        (one.data_ptr(), one.data_ptr() + one.numel() * one.element_size()) for one in tensors
    )
    total = end = 0
    for first, last in spans:
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def gradients_of(engine: Any, more: Any) -> int:
    """Bytes of the gradients that lie at the parameters, and of `more`."""
    gradients = tensors_in(more)
    for parameter in engine.module.parameters():
        # DeepSpeed keeps what it accumulates under a name of its own
        for one in (parameter.grad, getattr(parameter, "grad_accum", None)):
            gradients += tensors_in(one)
    return size(gradients)


def measure(engine: Any) -> None:
    module, optimizer, stage = engine.module, engine.optimizer, engine.zero_optimization_stage()
    parameters = list(module.parameters())
    held = [getattr(one, "ds_tensor", one) if stage == 3 else one for one in parameters]
    own = tensors_in(list(engine.basic_optimizer.state.values()))
    if stage in (1, 2):
        own += list(optimizer.single_partition_of_fp32_groups)
    elif stage == 3:
        own += list(optimizer.fp32_partitioned_groups_flat)
    if stage >= 2:
        found["gradients"] = gradients_of(engine, optimizer.averaged_gradients)
    found.update(
        parameters_in_all=sum(full_size(one) for one in parameters),
        parameters=sum(one.numel() * one.element_size() for one in held),
        optimizer=sum(one.numel() * one.element_size() for one in own if one.dim()),
    )


def main() -> None:
    path = Path(sys.argv[1])
    dist.init_process_group("gloo")
    step, backward = DeepSpeedEngine.step, DeepSpeedEngine.backward

    def measured_step(self: Any, *arguments: Any, **named: Any) -> None:
        measure(self)
        step(self, *arguments, **named)

    def measured_backward(self: Any, *arguments: Any, **named: Any) -> Any:
        loss = backward(self, *arguments, **named)
        if not self.is_gradient_accumulation_boundary():
            kept = getattr(self.optimizer, "all_grad_tensors", None)
            found["between"] = found["gradients"] = gradients_of(self, kept)
        return loss

    DeepSpeedEngine.step, DeepSpeedEngine.backward = measured_step, measured_backward
    results = []
    for settings in json.loads(path.read_text()):
        train(TrainConfig(**settings))
        results.append(dict(found))
    path.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


run_program(main)
