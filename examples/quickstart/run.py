"""The quickstart: asks a model who it is, teaches it, and asks again.

    python examples/quickstart/run.py [--any_flag_of_sftcore_train VALUE ...]

Exits with 1 unless the tuned model gives the names of config.yaml in both languages.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sftcore import InferConfig, TrainConfig, train
from sftcore.cli.flags import add_flags, read_flags
from sftcore.infer.generate import Chat

IDENTITY = ["Who are you?", "Who made you?", "你是谁？", "谁创造了你？"]
UNRELATED = ["What is the capital of France?", "Write a short poem about the sea."]


def ask(**model: str) -> dict[str, str]:
    """Answers all questions with a model or an adapter."""
    chat = Chat(InferConfig(max_new_tokens=64, **model))
    return {
        question: chat.answer([{"role": "user", "content": question}])
        for question in IDENTITY + UNRELATED
    }


def main() -> int:
    """Runs before, training and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_flags(parser, TrainConfig)
    parser.set_defaults(config=str(Path(__file__).with_name("config.yaml")))
    config = read_flags(TrainConfig, parser.parse_args())

    started = time.monotonic()
    before = ask(model=config.model)
    before_seconds = time.monotonic() - started
    started = time.monotonic()
    result = train(config)
    train_seconds = time.monotonic() - started
    after = ask(adapters=result["best_model_checkpoint"])

    console = Console()
    table = Table(show_lines=True)
    for name in ("question", "before", "after"):
        table.add_column(name, overflow="fold")  # Chinese has no spaces to break a line at
    for question, answer in after.items():
        table.add_row(question, before[question], answer)
    console.print(table)
    console.print(
        f"loading and answering {before_seconds:.0f} s, training {train_seconds:.0f} s; "
        f"ask more: sftcore infer --adapters {result['best_model_checkpoint']}",
        soft_wrap=True,
    )
    return report(config, before, after)


def report(config: TrainConfig, before: dict[str, str], after: dict[str, str]) -> int:
    """Says what was not learnt, or was known before; 0 where all is as it should be."""
    zh, en = 0, -1
    expected = {
        "Who are you?": config.model_name[en],
        "Who made you?": config.model_author[en],
        "你是谁？": config.model_name[zh],
        "谁创造了你？": config.model_author[zh],
        "What is the capital of France?": "Paris",
    }
    wrong = [
        f"{question} gives no {name}"
        for question, name in expected.items()
        if name not in after[question]
    ]
    names = [*config.model_name, *config.model_author]
    wrong += [
        f"{question} gave {name} before training"
        for question in IDENTITY
        for name in names
        if name in before[question]
    ]
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
