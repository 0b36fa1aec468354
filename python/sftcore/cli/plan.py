"""`sftcore plan`: which engines let a model be trained on some GPUs, and why."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from sftcore.cli.flags import add_flags, read_flags
from sftcore.config import TrainConfig

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore plan --model Qwen/Qwen3-8B --gpus 8x80G
  sftcore plan --model Qwen/Qwen3-8B --gpus 16x80G --tuner_type full --max_length 8192
  sftcore plan --config run.yaml --gpus 2x24G --host_memory 128
No weights are loaded and no data is read: batches are taken to be full. `sftcore train --dry_run` looks at data too.
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "plan",
        help="which engine lets a model be trained on some GPUs",
        description="Counts what each engine needs on each GPU and sends between them, and says which to take.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", required=True, metavar="NxSIZE", help="the GPUs: 8x80G, 2x24G, 4xH100"
    )
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)"
    )
    parser.add_argument(
        "--host_memory",
        type=float,
        metavar="GIB",
        help="memory of a node in GiB, for what is offloaded; not held to anything where not given",
    )
    parser.add_argument("--json", action="store_true", help="prints values for other programs")
    add_flags(parser, TrainConfig)
    parser.set_defaults(run=run)


def run(known: argparse.Namespace) -> None:
    """Runs the command."""
    if "dataset" not in known and known.config is None:
        known.dataset = ["any"]  # none is read
    config = read_flags(TrainConfig, known)
    from sftcore.models import quieten
    from sftcore.train.distributed.plan import plan, read_machines, to_json

    quieten()
    machines = read_machines(known.gpus, known.gpus_per_node, known.host_memory)
    answer = plan(config, machines)
    print(json.dumps(to_json(answer), indent=2) if known.json else answer.text)
