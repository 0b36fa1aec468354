"""What the tests of faults share: numbered rows, and a script in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sftcore.data import BatchLoader, Encoder, StreamLoader

GOOD = b'{"query": "q", "response": "a"}'


def row(number: int, word: str = "old") -> bytes:
    """A row that says which it is."""
    answer = "r " * (1 + number % 50)
    return json.dumps({"query": f"{word} {number}", "response": answer}).encode() + b"\n"


def write_rows(path: Path, numbers: Iterable[int], word: str = "old") -> Path:
    path.write_bytes(b"".join(row(number, word) for number in numbers))
    return path


def questions(encoder: Encoder, batches: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The question of each example, which is in one turn of ChatML."""
    for batch in batches:
        text = encoder.decode(batch["input_ids"].ravel(), skip_special_tokens=False)
        for part in text.split("<|im_start|>user\n")[1:]:
            yield part.split("<|im_end|>")[0]


def counts(loader: BatchLoader | StreamLoader) -> dict[str, Any]:
    """What the rows of one data set came to, once all were handed out."""
    for _ in loader:
        pass
    return loader.report if isinstance(loader, BatchLoader) else loader.report["sets"][0]


def run_script(script: str, *arguments: object, timeout: float = 120) -> str:
    """The last line that `script` prints; it is given the arguments, and must end well."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
