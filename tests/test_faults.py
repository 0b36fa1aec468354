"""Files that change under a run, signals, broken bytes: nothing hangs, nothing is lost unreported."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import RowError

GOOD = json.dumps({"query": "q", "response": "a"})


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "smollm2"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.from_pretrained(folder)


def write(path: Path, count: int, words: int = 20) -> Path:
    path.write_text(
        "".join(
            json.dumps({"query": f"row {number:06}", "response": "word " * words}) + "\n"
            for number in range(count)
        )
    )
    return path


# --- files that change while they are trained on ---


def test_a_file_that_is_cut_off_while_it_is_trained_on_is_an_error(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", 3000)
    loader = BatchLoader(path, encoder, batch_size=4, mode="sequential", return_tensors="np")
    iterator = iter(loader)
    next(iterator)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(RowError, match=f"{path}.*: the file changed while it was in use"):
        for _ in iterator:
            pass


def test_a_file_whose_rows_are_rewritten_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 3000)
    loader = BatchLoader(path, encoder, batch_size=4, mode="sequential", return_tensors="np")
    iterator = iter(loader)
    next(iterator)
    with path.open("r+") as file:
        file.write(path.read_text().replace("word word", "werd werd"))
    with pytest.raises(RowError, match=rf"{path}:\d+: the file changed while it was in use"):
        for _ in iterator:
            pass


def test_a_file_that_is_replaced_gives_its_old_rows_or_an_error(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", 3000)
    loader = BatchLoader(path, encoder, batch_size=4, mode="sequential", return_tensors="np")
    before = [batch["input_ids"].copy() for batch in loader]
    other = write(tmp_path / "other.jsonl", 3000, words=21)
    other.replace(path)
    loader.set_epoch(0)
    after = []
    # handles that are open still give the old file
    with contextlib.suppress(RowError):
        after += [batch["input_ids"] for batch in loader]
    assert all((one == two).all() for one, two in zip(before, after, strict=False))


def test_rows_that_are_appended_meanwhile_do_no_harm(encoder: Encoder, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 3000)
    loader = BatchLoader(path, encoder, batch_size=4, return_tensors="np")
    iterator = iter(loader)
    next(iterator)
    with path.open("a") as file:
        file.write(GOOD + "\n" + "not json")
    assert sum(1 for _ in iterator) == len(loader) - 1
    with pytest.raises(RowError, match=f"{path}:3002"):
        BatchLoader(path, encoder, return_tensors="np")


# --- signals ---

ITERATE = """
import sys
from sftcore.data import BatchLoader, Encoder, StreamLoader
encoder = Encoder.from_pretrained(sys.argv[2])
path = sys.argv[3]
print("ready", flush=True)
if sys.argv[1] == "index":
    for _ in range(10000):
        BatchLoader(path, encoder, cache=False, return_tensors="np")
loader = StreamLoader(path, encoder) if sys.argv[1] == "stream" else BatchLoader(path, encoder)
loader._return_tensors = "np"
if sys.argv[1] == "batches":
    loader._settings["return_tensors"] = "np"
while True:
    for batch in loader:
        pass
"""


@pytest.mark.parametrize("work", ["index", "batches", "stream"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_at_once(
    folder: Path, tmp_path: Path, work: str, number: signal.Signals
) -> None:
    path = write(tmp_path / "rows.jsonl", 20_000)
    environment = {**os.environ, "SFTCORE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", ITERATE, work, folder, path],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 3
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in err
    assert process.returncode in (-number, 1, 130)
    assert "panick" not in err
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    loader = BatchLoader(path, Encoder.from_pretrained(folder), return_tensors="np")
    assert loader.num_rows == 20_000


# --- broken files and odd bytes ---


def test_a_gz_with_a_broken_tail_is_an_error_or_gives_the_rows_before_it(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = "".join(
        json.dumps({"query": f"row {number}", "response": f"{number * 7919 % 10007}"}) + "\n"
        for number in range(5000)
    )
    whole = gzip.compress(rows.encode())
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(RowError, match=rf"{path}.*breaks off.*rows before it can be read"):
        BatchLoader(path, encoder, return_tensors="np")
    loader = BatchLoader(path, encoder, on_bad_row="skip", return_tensors="np")
    report = loader.report
    assert 2000 < loader.num_rows < 5000
    assert report["bad"] == 1
    assert "breaks off" in report["first_bad"][0]
    with pytest.raises(RowError, match=str(path)):
        list(StreamLoader(path, encoder, return_tensors="np"))


BIG_LINE = """
import resource, sys
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import RowError
encoder = Encoder.from_pretrained(sys.argv[1])
for loader in (BatchLoader, StreamLoader):
    try:
        list(loader(sys.argv[2], encoder, return_tensors="np"))
    except RowError as error:
        print(error)
loader = BatchLoader(sys.argv[2], encoder, on_bad_row="skip", return_tensors="np")
print(loader.num_rows, loader.report["bad"])
stream = StreamLoader(sys.argv[2], encoder, on_bad_row="skip", return_tensors="np")
list(stream)
print(stream.report["sets"][0]["examples"], stream.report["sets"][0]["bad"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_a_line_of_300_mb_is_a_wrong_row_and_takes_no_memory_for_long(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        file.write(GOOD + "\n" + '{"query": "q", "response": "')
        for _ in range(300):
            file.write("x" * 1_000_000)
        file.write('"}\n' + GOOD + "\n" + GOOD)
    shown = subprocess.run(
        [sys.executable, "-c", BIG_LINE, folder, path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for line in shown[:2]:
        assert line == f"{path}:2: a row of more than 256 MiB; is a newline missing?"
    assert shown[2:4] == ["3 1", "3 1"]
    assert int(shown[4]) < 900


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (b'{"query": "q", "response": "a\x00b"}', "NUL"),
        (b"\x00" * 40, "NUL"),
        (b'{"query": "q", "response": "\xe9t\xe9"}', "byte 0xe9 is not UTF-8"),
        (b'{"query": "q", "response": "a", "response": "b"}', '"response"'),
        (b'{"query": "q", "response": "\\ud800"}', "surrogate"),
        (b'{"query": "q", "response": "a", "id": 123456789012345678901234}', "64 bits"),
        (b'{"query": ' + b"[" * 100_000 + b"]" * 100_000 + b', "response": "a"}', "deep"),
    ],
)
def test_odd_bytes_are_named_by_line_and_left_out_one_by_one(
    encoder: Encoder, tmp_path: Path, row: bytes, text: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\r\n" + row + b"\n\xef\xbb\xbf"[:1] + GOOD.encode())
    with pytest.raises(RowError) as caught:
        BatchLoader(path, encoder, return_tensors="np")
    assert str(caught.value).startswith(f"{path}:2:")
    assert text in str(caught.value)
    report = BatchLoader(path, encoder, on_bad_row="skip", return_tensors="np").report
    assert (report["rows"], report["examples"], report["bad"]) == (3, 2, 1)


def test_a_byte_order_mark_and_crlf_are_passed_over(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode() + b"\r\n")
    loader = BatchLoader(path, encoder, mode="sequential", return_tensors="np")
    assert [loader.place(row)[1] for row in range(loader.num_rows)] == [1, 3]


MANY = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from sftcore.data import BatchLoader, Encoder
encoder = Encoder.from_pretrained(sys.argv[1])
for _ in range(2):
    started = time.monotonic()
    loader = BatchLoader(sys.argv[2], encoder, batch_size=50, return_rows=True, return_tensors="np")
    rows = sorted(row for batch in loader for row in batch["rows"].tolist())
    assert rows == list(range(10_000))
    print(loader.report["origin"], loader.report["files"], time.monotonic() - started)
"""


@pytest.mark.slow
def test_ten_thousand_files_are_one_data_set(folder: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(10_000):
        (files / f"{number:05}.jsonl").write_text(GOOD)
    environment = {**os.environ, "SFTCORE_CACHE": str(tmp_path / "cache")}
    shown = subprocess.run(
        [sys.executable, "-c", MANY, folder, files],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split()[:2] for line in shown] == [["built", "10000"], ["memo", "10000"]]


KINDS = ["jsonl", "ndjson", "json", "csv", "tsv", "jsonl.gz", "csv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_examples(
    encoder: Encoder, tmp_path: Path, kind: str
) -> None:
    rows = [
        {"query": f'row {number}, "quoted"\nand more', "response": "w " * (number % 9 + 1)}
        for number in range(50)
    ]
    plain = kind.removesuffix(".gz")
    if plain == "json":
        text = json.dumps(rows, indent=1)
    elif plain in ("csv", "tsv"):
        mark = "," if plain == "csv" else "\t"
        quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
        text = "\n".join([f"query{mark}response", *(mark.join(fields) for fields in quoted)])
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    loader = BatchLoader(path, encoder, mode="sequential", return_tensors="np")
    expected = encoder.encode_batch(rows)
    for batch, example in zip(loader, expected, strict=True):
        assert batch["input_ids"][0].tolist() == example.input_ids.tolist()
    stream = StreamLoader(path, encoder, mode="sequential", return_tensors="np")
    assert [batch["input_ids"][0].tolist() for batch in stream] == [
        example.input_ids.tolist() for example in expected
    ]
