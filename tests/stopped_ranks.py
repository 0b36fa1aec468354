"""A run of several ranks, of which one gets a signal: `torchrun stopped_ranks.py MODEL ROWS FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftcore.errors import StoppedError
from sftcore.program import run_program
from sftcore.train import log, train
from sftcore.train.trainer import SftTrainer
from tiny_runs import config_of

log.draw_curves = lambda history, folder: []  # type: ignore[assignment]
model, rows, folder = map(Path, sys.argv[1:])
config = config_of(
    model, rows, folder / "run", gradient_accumulation_steps=1, save_steps=1, logging_steps=4
)
calls = iter(range(1000))
training_step = SftTrainer.training_step


def strike(self: Any, *arguments: Any, **named: Any) -> Any:
    if next(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return training_step(self, *arguments, **named)


def main() -> None:
    train(replace(config, output_dir=str(folder / "whole")))
    SftTrainer.training_step = strike  # type: ignore[method-assign]
    try:
        train(config)
    except StoppedError as stopped:
        print(f"rank {os.environ['RANK']}: {stopped.exit_code}, {stopped}", flush=True)
    train(replace(config, resume_from_checkpoint="last"))


run_program(main)
