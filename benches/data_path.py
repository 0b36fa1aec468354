"""jsonl to padded batches: sftcore beside the field's usual way, in one run.

    python benches/data_path.py [--file FILE] [--copies N] [--rounds N]

The peer is what TRL does: `datasets` reads the file, `map` calls
`apply_chat_template(return_assistant_tokens_mask=True)` on each row with a hand-tagged template,
and a collator pads. Both use the same tokenizer. The ids and masks are compared before anything is
timed. Rates are of file bytes; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import transformers

from sftcore.data import BatchLoader, Encoder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_parity import TAGGED, read_rows, to_messages

SHARED = Path(
    os.environ.get("SFTCORE_SHARED", Path(__file__).parent.parent.parent / "shared" / "data")
)
FILES = [
    "gpteacher/roleplay.json",
    "llamafactory/alpaca_en_demo.json",
    "llamafactory/alpaca_zh_demo.json",
]
BATCH = 8


def write_corpus(path: Path, copies: int) -> None:
    """Writes real rows as messages; copies are told apart by a number, so that no cache sees a row twice."""
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for name in FILES:
                for row in read_rows(SHARED / "datasets" / name):
                    messages, _ = to_messages(row)
                    messages[0]["content"] += f" ({copy})"
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def encode_with(tokenizer: Any) -> Callable[[dict], dict]:
    """What the peer maps over rows: ids and mask by Transformers."""

    def encode(row: dict) -> dict:
        encoded = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=TAGGED,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return {"input_ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}

    return encode


def peer(path: Path, folder: Path, num_processes: int) -> list[tuple[list[int], list[int]]]:
    """`datasets` + `apply_chat_template` + a padding collator."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows = rows.map(
            encode_with(tokenizer),
            remove_columns=["messages"],
            num_proc=num_processes if num_processes > 1 else None,
            load_from_cache_file=False,
        )
        examples = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            width = max(map(len, batch["input_ids"]))
            ids = np.full((len(batch["input_ids"]), width), tokenizer.pad_token_id)
            labels = np.full_like(ids, -100)
            for line, (tokens, mask) in enumerate(
                zip(batch["input_ids"], batch["mask"], strict=True)
            ):
                ids[line, : len(tokens)] = tokens
                labels[line, : len(tokens)] = np.where(mask, tokens, -100)
                examples.append((tokens, mask))
        return examples


def ours(path: Path, folder: Path, num_threads: int) -> tuple[int, int]:
    """Index and one epoch of batches; returns rows and tokens."""
    encoder = Encoder.from_pretrained(folder)
    loader = BatchLoader(
        path, encoder, batch_size=BATCH, num_threads=num_threads, return_tensors="np"
    )
    tokens = sum(int(batch["attention_mask"].sum()) for batch in loader)
    return loader.num_rows, tokens


def check(path: Path, folder: Path) -> int:
    """Both sides give the same ids and masks; returns the tokens."""
    encoder = Encoder.from_pretrained(folder)
    lines = path.read_text(encoding="utf-8").splitlines()
    tokens = 0
    for example, (ids, mask) in zip(
        encoder.encode_batch(lines), peer(path, folder, 1), strict=True
    ):
        assert example.input_ids.tolist() == ids
        assert example.loss_mask.astype(int).tolist() == mask
        tokens += len(ids)
    return tokens


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median wall time."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    known = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"needs the shared data folder ({SHARED}); set SFTCORE_SHARED to it")
    datasets.disable_progress_bars()
    folder = SHARED / "tokenizers" / "smollm2"
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "rows.jsonl"
        write_corpus(path, known.copies)
        tokens = check(path, folder)
        megabytes = path.stat().st_size / 1e6
        num_rows = sum(1 for _ in path.open(encoding="utf-8"))
        print(f"{num_rows:,} rows, {megabytes:.1f} MB, {tokens:,} tokens; ids and masks are equal")
        print(f"{'':<34}{'MB/s':>8}{'rows/s':>10}{'tokens/s':>12}{'ratio':>8}")
        for cores in (1, 2):
            os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(os.getppid()))[:cores]))
            base = seconds(lambda cores=cores: peer(path, folder, cores), known.rounds)
            fast = seconds(lambda cores=cores: ours(path, folder, cores), known.rounds)
            encoder = Encoder.from_pretrained(folder)
            loader = BatchLoader(
                path, encoder, batch_size=BATCH, num_threads=cores, return_tensors="np"
            )
            epoch = seconds(lambda loader=loader: sum(1 for _ in loader), known.rounds)
            for name, took in (
                (f"datasets.map, {cores} core(s)", base),
                (f"sftcore, index + epoch, {cores} core(s)", fast),
                (f"sftcore, later epochs, {cores} core(s)", epoch),
            ):
                rates = megabytes / took, num_rows / took, tokens / took
                print(
                    f"{name:<34}{rates[0]:>8.2f}{rates[1]:>10,.0f}{rates[2]:>12,.0f}{base / took:>7.1f}x"
                )


if __name__ == "__main__":
    main()
