r"""jsonl rows to masked examples on one core: our two engines, beside Transformers as TRL uses it.

Real rows (English and Chinese) become token ids and masks in each of these ways:

- `datasets.map` over `apply_chat_template(return_assistant_tokens_mask=True)`, as TRL does it;
- `Encoder.encode_batch` with the reference engine (Hugging Face's `tokenizers`);
- `Encoder.encode_batch` with the fast engine, the first time and again (with its word cache filled);
- the fast engine alone, on the rendered texts.

Ids and masks are compared before anything is timed. Then a chat of 200 turns beside its turns as
chats of their own shows what length costs.

    python benches/encode.py --copies 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import transformers
from data_path import SHARED, encode_with, write_corpus

from sftcore.data import Encoder


def trl_way(path: Path, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and masks through `datasets.map`."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows = rows.map(
            encode_with(tokenizer), remove_columns=["messages"], load_from_cache_file=False
        )
        return list(zip(rows["input_ids"], rows["mask"], strict=True))


def open_encoder(folder: Path, engine: str, num_threads: int = 1) -> Encoder:
    """An encoder on one core."""
    return Encoder.from_pretrained(folder, tokenizer_engine=engine, num_threads=num_threads)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    known = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"needs the shared data folder ({SHARED}); set SFTCORE_SHARED to it")
    datasets.disable_progress_bars()
    template = SHARED / "tokenizers" / "smollm2"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "rows.jsonl"
        write_corpus(path, known.copies)
        lines = path.read_bytes().splitlines()
        reference, fast = open_encoder(template, "reference"), open_encoder(template, "fast")
        examples = fast.encode_batch(lines)
        tokens = sum(map(len, examples))
        for one, other, (ids, mask) in zip(
            examples, reference.encode_batch(lines), trl_way(path, template), strict=True
        ):
            assert one.input_ids.tolist() == other.input_ids.tolist() == ids
            assert one.loss_mask.tolist() == other.loss_mask.tolist() == list(map(bool, mask))
        texts = [example.text for example in examples]
        megabytes = path.stat().st_size / 1e6
        print(
            f"{len(lines):,} rows, {megabytes:.1f} MB, {tokens:,} tokens; ids and masks are equal"
        )

        def cold(engine: str) -> float:
            encoder = open_encoder(template, engine)
            return seconds(lambda: encoder.encode_batch(lines))

        rounds = range(known.rounds)
        base = statistics.median(seconds(lambda: trl_way(path, template)) for _ in rounds)
        results = [
            ("datasets.map, TRL's way", base),
            ("reference engine", statistics.median(cold("reference") for _ in rounds)),
            ("fast engine, first pass", statistics.median(cold("fast") for _ in rounds)),
            (
                "fast engine, later passes",
                statistics.median(seconds(lambda: fast.encode_batch(lines)) for _ in rounds),
            ),
            (
                "fast engine alone, on texts",
                statistics.median(
                    seconds(lambda: [fast.tokenize(text) for text in texts]) for _ in rounds
                ),
            ),
        ]
        os.sched_setaffinity(0, cores[:2])
        if len(cores) > 1:
            both = open_encoder(template, "fast", num_threads=2)
            both.encode_batch(lines)
            took = statistics.median(seconds(lambda: both.encode_batch(lines)) for _ in rounds)
            results.append(("fast engine, later passes, 2 cores", took))
        print(f"{'one core':<36}{'MB/s':>8}{'M tokens/s':>12}{'ratio':>8}")
        for name, took in results:
            print(
                f"{name:<36}{megabytes / took:>8.2f}{tokens / took / 1e6:>12.2f}{base / took:>7.1f}x"
            )
        os.sched_setaffinity(0, cores[:1])
        show_long_chat(lines, open_encoder(template, "fast"))


def show_long_chat(lines: list[bytes], encoder: Encoder) -> None:
    """Times 200 turns as one chat and as 200."""
    rows = [json.loads(line)["messages"] for line in lines[:200]]
    short = [json.dumps(row).encode() for row in rows]
    long = [json.dumps([message for row in rows for message in row]).encode()]
    num_tokens = len(encoder.encode(long[0]))
    for name, chats in (("200 turns in one chat", long), ("the same as 200 chats", short)):
        encoder.encode_batch(chats)
        took = statistics.median(
            seconds(lambda chats=chats: encoder.encode_batch(chats)) for _ in range(9)
        )
        print(f"{name:<36}{'':>8}{num_tokens / took / 1e6:>12.2f}")


if __name__ == "__main__":
    main()
