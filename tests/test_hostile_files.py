"""Files made to hurt: memory and time stay bounded, and what cannot be used is told. Each in a process of its own."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fault_files import GOOD, run_script, write_rows

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads the peak of memory from /proc"
)

RUN = """
import json, re, resource, sys, time
from pathlib import Path
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import SftcoreError
folder, path, name, settings, handles = sys.argv[1:]
if int(handles):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(handles), int(handles)))
encoder = Encoder.from_pretrained(folder)
begun, seen = time.monotonic(), {}
try:
    loader = {"batch": BatchLoader, "stream": StreamLoader}[name](
        path, encoder, num_threads=2, return_tensors="np", **json.loads(settings))
    seen["batches"] = sum(1 for _ in loader)
    seen["report"] = loader.report if name == "batch" else loader.report["sets"][0]
except (SftcoreError, OSError) as error:
    seen["error"] = str(error)
seen["seconds"] = time.monotonic() - begun
# not ru_maxrss, which knows the process that started this one too
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
seen["megabytes"] = int(peak[1]) >> 10
print(json.dumps(seen))
"""
LOADERS = ["batch", "stream"]
HOLE = 300_000_000


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "smollm2"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(
    tokenizer: Path,
    path: Path,
    loader: str,
    *,
    megabytes: int = 600,
    seconds: float = 30,
    handles: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    seen = json.loads(run_script(RUN, tokenizer, path, loader, json.dumps(settings), handles))
    assert seen["megabytes"] < megabytes
    assert seen["seconds"] < seconds
    return seen


def write_hole(path: Path, before: bytes, after: bytes) -> Path:
    """A file of 300 MB that takes no room."""
    with path.open("wb") as file:
        file.write(before)
        file.seek(HOLE, 1)
        file.write(after)
        file.truncate()
    return path


@pytest.mark.parametrize("loader", LOADERS)
def test_a_line_of_300_megabytes_is_one_wrong_row(
    tokenizer: Path, tmp_path: Path, loader: str
) -> None:
    path = write_hole(
        tmp_path / "rows.jsonl", GOOD + b'\n{"query": "', b'"}\n' + GOOD + b"\n" + GOOD
    )
    expected = f"{path}:2: a row of more than 256 MiB; is a newline missing?"
    assert run(tokenizer, path, loader)["error"] == expected
    report = run(tokenizer, path, loader, on_bad_row="skip")["report"]
    assert (report["rows"], report["examples"], report["bad"]) == (4, 3, 1)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_first_line_of_300_megabytes_is_one_wrong_row(
    tokenizer: Path, tmp_path: Path, loader: str
) -> None:
    path = write_hole(tmp_path / "rows.jsonl", b'{"query": "', b'"}\n' + GOOD)
    report = run(tokenizer, path, loader, on_bad_row="skip")["report"]
    assert (report["rows"], report["examples"], report["bad"]) == (2, 1, 1)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("name", "before", "line"),
    [
        ("rows.csv", b'query,response\nq,a\nq,"', 3),
        ("rows.csv", b'query,"response\nq,a\n', 1),
        ("rows.json", b"[" + GOOD + b',\n{"query": "', 2),
        ("rows.json", b'[\n{"query": "', 2),
        ("rows.json", b'{\n"query": "', 1),
    ],
)
def test_a_quote_that_is_never_closed_is_an_error_at_its_row(
    tokenizer: Path, tmp_path: Path, loader: str, name: str, before: bytes, line: int
) -> None:
    path = write_hole(tmp_path / name, before, b"")
    error = run(tokenizer, path, loader, megabytes=900)["error"]
    assert error.startswith(f"{path}:{line}: ")
    assert "is missing" in error or "more than 256 MiB" in error


@pytest.mark.slow
def test_a_bomb_is_unpacked_in_bounded_memory(tokenizer: Path, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(1 << 24)) * 64)
    assert path.stat().st_size < 1_100_000
    for loader in LOADERS:
        error = run(tokenizer, path, loader)["error"]
        assert error.startswith(f"{path}:1: NUL bytes where a row should be")


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_a_bomb_between_rows_costs_one_row(tokenizer: Path, tmp_path: Path, loader: str) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed = [gzip.compress(GOOD + b"\n"), *[gzip.compress(b" " * (1 << 24) + b"x")] * 64]
    path.write_bytes(b"".join([*packed, gzip.compress(b"\n" + GOOD)]))
    report = run(tokenizer, path, loader, on_bad_row="skip")["report"]
    assert (report["rows"], report["examples"], report["bad"]) == (3, 2, 1)
    said = [f"{path}: unpacked to 1024 MiB on disk"] if loader == "batch" else []
    assert report["notes"] == said


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_a_million_wrong_rows_take_seconds(tokenizer: Path, tmp_path: Path, loader: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n{}" * 999_999)
    report = run(tokenizer, path, loader, on_bad_row="skip", megabytes=1000)["report"]
    assert (report["rows"], report["examples"], report["bad"]) == (1_000_000, 1, 999_999)


@pytest.mark.slow
def test_an_array_nested_without_end_is_an_error(tokenizer: Path, tmp_path: Path) -> None:
    for name, text in {
        "a.json": b"[" * 1_000_000,
        "b.json": b"[" * 1_000_000 + b"]" * 1_000_000,
        "c.jsonl": b'{"a":' * 1_000_000,
        "d.json": b'{"a":\n' * 1_000_000,
    }.items():
        (tmp_path / name).write_bytes(text)
        for loader in LOADERS:
            error = run(tokenizer, tmp_path / name, loader)["error"]
            assert error.startswith(f"{tmp_path / name}:")


@pytest.mark.slow
def test_ten_thousand_files_are_read_with_256_handles(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(10_000):
        write_rows(folder / f"{number:05}.jsonl", [number])
    for origin, seconds in (("built", 30), ("memo", 10)):
        seen = run(tokenizer, folder, "batch", handles=256, seconds=seconds, dedup="exact")
        report = seen["report"]
        assert (report["origin"], report["files"], report["examples"]) == (origin, 10_000, 10_000)
        # no row came twice
        assert (seen["batches"], report["duplicates"]) == (10_000, 0)
    assert run(tokenizer, folder, "stream", handles=256)["batches"] == 10_000
