"""`sftcore train`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from sftcore.cli import launch
from sftcore.cli.flags import add_flags, read_flags
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError, StoppedError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore train --model smollm2-135m --dataset my.jsonl --learning_rate 2e-4 --num_train_epochs 2
  sftcore train --config run.yaml --max_steps 100
  sftcore train --config run.yaml --resume_from_checkpoint last
  NPROC_PER_NODE=2 sftcore train --config run.yaml  two processes of this machine share the run
  sftcore train --config run.yaml --dry_run        what it would do, and how much memory and time it takes
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "train",
        help="tune a model on instruction data (alias: sft)",
        description="Tune a model on instruction data.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, TrainConfig)
    parser.set_defaults(run=run)


def run(known: argparse.Namespace) -> None:
    """Runs the command."""
    config = read_flags(TrainConfig, known)
    if launch.is_wanted():
        sys.exit(launch.launch(["train", *known.command_words], max_restarts=config.max_restarts))
    if config.max_restarts and not launch.reports_to_launcher():
        raise ConfigError(
            "--max_restarts is of the launcher of sftcore: start it with NPROC_PER_NODE=1 sftcore train ..., or pass "
            "--max-restarts to torchrun"
        )
    launch.follow_launcher()
    from sftcore.train import train  # torch is loaded once the settings are known to be right

    # what libraries print is no result; a dry run prints its plan
    elsewhere = (
        contextlib.nullcontext() if config.dry_run else contextlib.redirect_stdout(sys.stderr)
    )
    try:
        with elsewhere:
            result = train(config)
    except StoppedError as stopped:
        if launch.reports_to_launcher():
            launch.write_error(stopped, str(stopped))
        elif os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    if not config.dry_run and os.environ.get("RANK", "0") == "0":
        print(result["best_model_checkpoint"])
