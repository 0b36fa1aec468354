"""Runs of several processes for tests, by torchrun on this machine with gloo between them; and of one to compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 400
_WORKER = Path(__file__).with_name("run_rank.py")


def run_processes(
    count: int, runs: list[dict[str, Any]], folder: Path
) -> list[list[dict[str, Any]]]:
    """Trains with each of some settings in `count` processes; returns what each rank found of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    start(count, [str(_WORKER), str(path)], folder)
    return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(count)]


def run_named(
    count: int, runs: dict[str, dict[str, Any]], folder: Path, model: Path, rows: Path
) -> dict[str, dict[str, Any]]:
    """Trains in `count` processes; returns by name what rank 0 found, after all ranks agreed."""
    listed = [settings_of(model, rows, folder / name, **given) for name, given in runs.items()]
    ranks = run_processes(count, listed, folder)
    for other in ranks[1:]:
        assert [one.get("losses") for one in other] == [one.get("losses") for one in ranks[0]]
    return dict(zip(runs, ranks[0], strict=True))


def run_alone(runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Trains with each of some settings in one process without torchrun; returns what it found of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    _run([sys.executable, str(_WORKER), str(path)], folder)
    found: list[dict[str, Any]] = json.loads(path.with_suffix(".0.json").read_text())
    return found


def start(count: int, words: list[str], folder: Path) -> None:
    """Runs a Python file in `count` processes, and fails with what they wrote where one of them does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    _run([*command, "--nproc_per_node", str(count), *words], folder)


def _run(command: list[str], folder: Path) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = folder / "processes.log"
    with log.open("w") as file:
        code = subprocess.run(
            command, stdout=file, stderr=file, env=variables, timeout=SECONDS, check=False
        ).returncode
    assert code == 0, log.read_text()[-4000:]


def settings_of(model: Path, rows: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """Four examples a step for one process; pass half the accumulation for two of them."""
    given: dict[str, Any] = {
        "model": str(model),
        "dataset": [str(rows)],
        "output_dir": str(output),
        "add_version": False,
        "tuner_type": "full",
        "split_dataset_ratio": 0.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": ["none"],
    }
    if settings.get("tuner_type") not in (None, "full", "freeze"):
        given["lora_dropout"] = 0.0
    return {**given, **settings}


def ids_of_steps(run_folder: Path) -> list[Any]:
    """What the ledger says that each optimizer step saw."""
    lines = (run_folder / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
