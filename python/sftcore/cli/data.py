"""`sftcore data show`: rows as the model will see them, with what is trained marked."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore data show my.jsonl                  rows 1 to 3, rendered as ChatML
  sftcore data show my.jsonl --model DIR      as the chat template of a model renders them
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("data", help="look at data files")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="print rows as text, with what is trained marked",
        description="Print rows as the model will see them. What is trained is green, or between «» without colour.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("file", type=Path, metavar="FILE", help="a .jsonl, .json or .txt file")
    show.add_argument("--rows", type=int, default=3, metavar="N", help="how many rows (default: 3)")
    show.add_argument("--model", metavar="DIR", help="a model folder, whose chat template is used")
    show.add_argument(
        "--template",
        default="auto",
        metavar="NAME",
        help="a packaged template or a .jinja file (default: the model's own, chatml without a model)",
    )
    show.set_defaults(run=run)


def run(known: argparse.Namespace) -> None:
    """Runs the command."""
    from sftcore.data import render_rows

    rows = render_rows(known.file, template=known.template, model=known.model, limit=known.rows)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    opening, closing = ("\033[32m", "\033[0m") if colour else ("«", "»")
    for row in rows:
        trained = sum(len(text) for text, is_trained in row.pieces if is_trained)
        total = sum(len(text) for text, _ in row.pieces)
        tokens = f", {row.num_tokens} tokens" if row.num_tokens is not None else ""
        print(
            f"--- {known.file}:{row.line}: {row.shape}, {total} characters, {trained} trained{tokens}"
        )
        print(
            "".join(
                f"{opening}{text}{closing}" if is_trained else text
                for text, is_trained in row.pieces
            )
        )
