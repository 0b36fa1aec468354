"""One process of several in a test: trains with each of some settings, one after the other.

    torchrun --nproc_per_node 2 tests/run_rank.py RUNS.json

RUNS.json is a list of settings; beside it comes RUNS.RANK.json with what each of them logged, or the error that
it ended with, and the bytes of parameters, gradients and optimizer state that this rank held after its last step.
Processes start once for all, as importing torch takes longer than such a run; without torchrun it is one process.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sftcore.config import TrainConfig
from sftcore.errors import SftcoreError
from sftcore.program import end_abruptly, run_program
from sftcore.train import train

held: dict[str, int] = {}


def num_bytes(tensors: list[Any]) -> int:
    plain = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    # counters of steps are no part of what is spread
    return sum(t.numel() * t.element_size() for t in plain if torch.is_tensor(t) and t.dim())


def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not optimizer.state:
        return
    held["parameters"] = num_bytes([p.detach() for p in parameters])
    held["gradients"] = num_bytes([p.grad for p in parameters])
    states = [value for state in optimizer.state.values() for value in state.values()]
    held["optimizer"] = num_bytes([value for value in states if torch.is_tensor(value)])


def main() -> None:
    path = Path(sys.argv[1])
    register_optimizer_step_post_hook(measure)
    is_alone = "RANK" not in os.environ
    if not is_alone:
        if os.environ["WORLD_SIZE"] == "1":
            end_abruptly()  # plain engines need no group then
        dist.init_process_group("gloo")
    results: list[dict[str, Any]] = []
    for settings in json.loads(path.read_text()):
        held.clear()
        try:
            result = train(TrainConfig(**settings))
        except SftcoreError as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
            continue
        logs = [entry for entry in result["log_history"] if "loss" in entry]
        evaluations = [entry for entry in result["log_history"] if "eval_loss" in entry]
        results.append(
            {
                "steps": [entry["step"] for entry in logs],
                "losses": [entry["loss"] for entry in logs],
                "grad_norms": [entry["grad_norm"] for entry in logs],
                "eval_losses": [entry["eval_loss"] for entry in evaluations],
                "output_dir": result["output_dir"],
                "last": result["last_model_checkpoint"],
                "best": result["best_model_checkpoint"],
                "bytes": dict(held),
            }
        )
    path.with_suffix(f".{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    if not is_alone:
        dist.barrier()
        dist.destroy_process_group()


if os.environ.get("WORLD_SIZE", "1") != "1":
    # reached only where Python is taken down, which may abort one of several processes
    atexit.register(os._exit, 70)
run_program(main)
