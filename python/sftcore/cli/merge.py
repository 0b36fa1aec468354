"""`sftcore merge`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sftcore.cli.flags import add_flags, read_flags
from sftcore.config import MergeConfig

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore merge --adapters output/smollm2-135m/v0-TIME/checkpoint-30 --output_dir merged
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "merge",
        help="put an adapter into the base weights",
        description="Put an adapter into the base weights, as a folder that plain Transformers loads.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, MergeConfig)
    parser.set_defaults(run=run)


def run(known: argparse.Namespace) -> None:
    """Runs the command."""
    config = read_flags(MergeConfig, known)
    from sftcore.export import merge  # torch is loaded once the settings are known to be right

    print(merge(config))
