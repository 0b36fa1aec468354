"""Runs of engines that spread the parameters, and what their checkpoints hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
from processes import SECONDS, start

_WORKER = str(Path(__file__).with_name("spread_rank.py"))


def settings_of(model: Path, rows: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """Four examples a step for one process, without dropout where there is an adapter."""
    given = processes.settings_of(model, rows, output, **settings)
    if given["tuner_type"] == "full":
        given.pop("lora_dropout", None)
    return given


def alone(runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Trains with each of some settings in one process without torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, _WORKER, str(path)],
        env=variables,
        timeout=SECONDS,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(path.with_suffix(".0.json").read_text())
    return found


def run_spread(count: int, runs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Trains with each of some settings in `count` processes; returns what each rank found of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    start(count, [_WORKER, str(path)], folder)
    return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(count)]


def saved_tensors(checkpoint: Path) -> dict[str, Any]:
    """The tensors of the model or adapter in a checkpoint."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (checkpoint / name).is_file():
            tensors |= load_file(checkpoint / name)
    assert tensors
    return tensors


def logits_of(folder: Path, base: Path) -> Any:
    """The logits of plain Transformers, and plain PEFT where the folder has an adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    is_adapter = (folder / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if is_adapter else folder)
    if is_adapter:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        ids = torch.arange(100, 140)[None]
        return model(input_ids=ids, use_cache=False).logits
