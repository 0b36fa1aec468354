"""Short training runs for tests: their settings and what they log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftcore.config import TrainConfig


def config_of(model: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "model": str(model),
        "dataset": [str(rows)],
        "output_dir": str(output),
        "add_version": False,
        "tuner_type": "full",
        "split_dataset_ratio": 0.0,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.05,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return TrainConfig(**{**given, **settings})


def losses(result: dict[str, Any]) -> list[float]:
    return [float(entry["loss"]) for entry in result["log_history"] if "loss" in entry]
