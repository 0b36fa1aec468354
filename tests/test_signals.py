"""Ctrl-C and SIGTERM end a run at once, wherever it is, leave nothing half written, and the next start works."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fault_files import row, run_script, write_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# says when it is where the signal is to strike, and would then go on for ever
BATCHES = """
import sys
from sftcore.data import BatchLoader, Encoder
encoder = Encoder.from_pretrained(sys.argv[1])
stage = sys.argv[3]
def say(done, all):
    if stage == "indexing":
        print("there", flush=True)
loader = BatchLoader(sys.argv[2], encoder, num_threads=1, return_tensors="np", progress=say)
while stage == "iterating":
    for batch in loader:
        print("there", flush=True)
print(loader.num_rows, loader.report["origin"])
"""
STREAM = """
import sys
from sftcore.data import Encoder, StreamLoader
encoder = Encoder.from_pretrained(sys.argv[1])
loader = StreamLoader(sys.argv[2], encoder, num_threads=1, shuffle_buffer_size=100, return_tensors="np")
print("there", flush=True)
while True:
    for batch in loader:
        if sys.argv[2] != "-":
            print("there", flush=True)
"""
MANY = 60_000


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "smollm2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def strike(number: signal.Signals, script: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts `script`, sends it the signal where it says to, and waits for its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        # past the line, into the core
        time.sleep(0.1)
        begun = time.monotonic()
        process.send_signal(number)
        while process.poll() is None:
            assert time.monotonic() - begun < 2
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.returncode == -number
    assert process.stderr is not None
    if number == signal.SIGINT:
        assert process.stderr.read().rstrip().endswith("KeyboardInterrupt")
    return process


def kinds_in(cache: Path) -> set[str]:
    return {path.suffix for path in cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["indexing", "iterating"])
def test_a_loader_ends_and_the_next_start_works(
    tokenizer: Path, tmp_path: Path, cache: Path, number: signal.Signals, stage: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", range(MANY))
    strike(number, BATCHES, tokenizer, path, stage)
    assert kinds_in(cache) == ({".lock"} if stage == "indexing" else {".lock", ".index"})
    origin = "built" if stage == "indexing" else "memo"
    assert run_script(BATCHES, tokenizer, path, "whole") == f"{MANY} {origin}"


def test_ctrl_c_while_a_file_is_unpacked_leaves_nothing(
    tokenizer: Path, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(map(row, range(1000))) * 600, 1))
    strike(signal.SIGINT, BATCHES, tokenizer, path, "indexing")
    assert kinds_in(cache) <= {".lock", ".rows"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_ends(
    tokenizer: Path, tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", range(2000))
    strike(number, STREAM, tokenizer, path)
    assert not cache.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_ends_though_its_pipe_says_nothing(
    tokenizer: Path, cache: Path, number: signal.Signals
) -> None:
    strike(number, STREAM, tokenizer, "-")
