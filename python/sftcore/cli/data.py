"""`sftcore data`: rows as the model will see them, and the rows that a step of a run saw."""

from __future__ import annotations

import argparse
import json
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

WHY_EXAMPLE = """example:
  sftcore data why --run output/smollm2-135m/v0-20261124-101500 --step 812
"""
_PREVIEW = 200


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
    why = actions.add_parser(
        "why",
        help="print the rows that a step of a run saw",
        description="Print the rows, files and lines of one optimizer step of a run, and prove by the run's ledger "
        "that they are what it saw.",
        epilog=WHY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    why.add_argument(
        "--run",
        dest="folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder of the run",
    )
    why.add_argument(
        "--step", type=int, required=True, metavar="N", help="the optimizer step, from 1"
    )
    why.add_argument("--full", action="store_true", help="print whole texts, not their beginnings")
    why.add_argument("--json", action="store_true", help="print one JSON object a row")
    why.set_defaults(run=run_why)


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


def run_why(known: argparse.Namespace) -> None:
    """Runs the command."""
    from sftcore.data.progress import IndexProgress
    from sftcore.data.run import look_up_step
    from sftcore.errors import RowError

    seen = look_up_step(known.folder, known.step, progress=IndexProgress("data"))
    recorded = seen.recorded
    is_equal = recorded is not None and recorded.examples == seen.hash
    if known.json:
        for row in seen.rows:
            place = {"row": row.row, "source": row.source, "path": str(row.path), "line": row.line}
            print(json.dumps({**place, "text": row.text}, ensure_ascii=False))
    else:
        print(
            f"step {known.step}: epoch {seen.epoch + 1}, step {seen.step + 1} of {seen.steps}, "
            f"{len(seen.rows)} examples"
        )
        for row in seen.rows:
            print(f"--- {row.path}:{row.line} ({row.source})")
            text = row.text if known.full else " ".join(row.text.split())
            print(text if known.full or len(text) <= _PREVIEW else text[:_PREVIEW] + "…")
    if recorded is None:
        print("ledger: the run did not come to this step", file=sys.stderr)
    elif is_equal:
        print(f"ledger: these are the examples the step saw ({seen.hash})", file=sys.stderr)
    else:
        raise RowError(
            f"step {known.step} saw other examples than these (ledger {recorded.examples}, now {seen.hash}): the data "
            "changed since the run"
        )
