"""One process of several in a test: trains with each of some settings, one after the other.

    torchrun --nproc_per_node 2 tests/run_rank.py RUNS.json

RUNS.json is a list of settings; beside it comes RUNS.RANK.json with what each of them logged, or the error that
it ended with. Processes start once for all, as importing torch takes longer than such a run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sftcore.config import TrainConfig
from sftcore.errors import SftcoreError
from sftcore.train import train


def main() -> None:
    path = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results: list[dict[str, Any]] = []
    for settings in json.loads(path.read_text()):
        try:
            result = train(TrainConfig(**settings))
        except SftcoreError as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
            continue
        logs = [entry for entry in result["log_history"] if "loss" in entry]
        evaluations = [entry for entry in result["log_history"] if "eval_loss" in entry]
        results.append(
            {
                "losses": [entry["loss"] for entry in logs],
                "grad_norms": [entry["grad_norm"] for entry in logs],
                "eval_losses": [entry["eval_loss"] for entry in evaluations],
                "output_dir": result["output_dir"],
                "last": result["last_model_checkpoint"],
            }
        )
    path.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


main()
