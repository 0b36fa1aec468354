"""`sftcore infer`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sftcore.cli.flags import add_flags, read_flags
from sftcore.config import InferConfig

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore infer --adapters output/smollm2-135m/v0-TIME/checkpoint-30
  sftcore infer --model smollm2-135m --prompt "What is the capital of France?"
  sftcore infer --adapters CHECKPOINT --prompts questions.txt --output answers.jsonl
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "infer",
        help="ask a model: one prompt, a file of prompts, or a chat",
        description="Ask a model: one prompt, a file of prompts, or a chat that streams.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, InferConfig)
    parser.set_defaults(run=run)


def run(known: argparse.Namespace) -> None:
    """Runs the command."""
    config = read_flags(InferConfig, known)
    from sftcore.infer import infer  # torch is loaded once the settings are known to be right

    answers = infer(config)
    if config.prompt is not None:
        print(answers[0]["response"])
