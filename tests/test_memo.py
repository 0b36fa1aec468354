"""The index is made once: kept for later starts, shared by the processes of a node, never waited for in vain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftcore.data import BatchLoader, Encoder

OPEN = """
import sys, resource
from sftcore.data import BatchLoader, Encoder
encoder = Encoder.from_pretrained(sys.argv[1])
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
loader = BatchLoader(sys.argv[2], encoder, num_threads=1, return_tensors="np")
print(loader.report["origin"], loader.num_rows, loader.fingerprint, *loader.report["notes"])
"""


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "smollm2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            words = " ".join(f"{(number * 7919 + place) % 100003}" for place in range(number % 90))
            file.write(json.dumps({"query": f"row {number}", "response": f"{words} end"}) + "\n")
    return path


def start(folder: Path, path: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, str(folder), str(path), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip().split(maxsplit=3)


def test_a_second_start_takes_the_index_that_was_kept(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", 500)
    encoder = Encoder.from_pretrained(folder)
    first, second = (BatchLoader(path, encoder, return_tensors="np") for _ in range(2))
    assert (first.report["origin"], second.report["origin"]) == ("built", "memo")
    assert {**first.report, "origin": ""} == {**second.report, "origin": ""}
    assert first.fingerprint == second.fingerprint
    for one, other in zip(first, second, strict=True):
        assert (one["input_ids"] == other["input_ids"]).all()


@pytest.mark.parametrize("change", ["rows", "length", "dedup", "columns", "damage", "none"])
def test_an_index_serves_only_what_it_was_made_of(
    folder: Path, tmp_path: Path, cache: Path, change: str
) -> None:
    path = write(tmp_path / "rows.jsonl", 100)
    settings: dict = {"return_tensors": "np"}
    BatchLoader(path, Encoder.from_pretrained(folder), **settings)
    max_length = None
    if change == "rows":
        with path.open("a") as file:
            file.write('{"query": "one", "response": "more"}')
    elif change == "length":
        max_length = 5000
    elif change == "dedup":
        settings["dedup"] = "exact"
    elif change == "columns":
        settings["columns"] = {"query": "prompt"}
    elif change == "damage":
        kept = next((cache / "index").glob("*.index"))
        kept.write_bytes(kept.read_bytes()[:-100])
    encoder = Encoder.from_pretrained(folder, max_length=max_length)
    loader = BatchLoader(path, encoder, **settings)
    assert loader.report["origin"] == ("memo" if change == "none" else "built")
    assert loader.num_rows == 100 + (change == "rows")


def test_without_a_cache_nothing_is_written(folder: Path, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 10)
    encoder = Encoder.from_pretrained(folder)
    loader = BatchLoader(path, encoder, cache=False, return_tensors="np")
    assert loader.report["origin"] == "built"
    assert not cache.exists()


@pytest.mark.slow
def test_processes_that_start_together_make_one_index(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", 60_000)
    found = [finish(process) for process in [start(folder, path) for _ in range(4)]]
    origins = sorted(words[0] for words in found)
    assert origins.count("built") == 1
    assert set(origins) <= {"built", "shared", "memo"}
    assert len({tuple(words[1:3]) for words in found}) == 1


@pytest.mark.slow
def test_a_builder_that_is_killed_is_followed_by_one_that_watched(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", 120_000)
    builder = start(folder, path)
    # it is at work once it has said how far it is
    deadline = time.monotonic() + 60
    while not any(lock.stat().st_size for lock in (cache / "index").glob("*.lock")):
        assert builder.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watcher = start(folder, path)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert finish(watcher)[:2] == ["built", "120000"]
    assert finish(start(folder, path))[:2] == ["memo", "120000"]


def test_a_full_disk_costs_the_index_that_would_be_kept_and_is_said(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", 2000)
    origin, rows, _, note = finish(start(folder, path, limit=8192))
    assert (origin, rows) == ("built", "2000")
    assert note.startswith(f"the index could not be kept in {cache / 'index'}: File too large")
    assert not list((cache / "index").glob("*.index*"))
    assert not list((cache / "index").glob("*.tmp"))
