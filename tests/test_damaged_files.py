"""Files that are broken inside: an error with place, finding and remedy, or the good rows and a count of the rest."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fault_files import GOOD, counts, row
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import RowError

LOADERS = [BatchLoader, StreamLoader]
Loader = type[BatchLoader] | type[StreamLoader]


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))


def message(loader: Loader, path: Path, encoder: Encoder, **settings: Any) -> str:
    with pytest.raises(RowError) as caught:
        counts(loader(path, encoder, return_tensors="np", **settings))
    assert caught.value.path == str(path)
    return str(caught.value).removeprefix(f"{path.parent}/")


# the words differ from row to row, so that they take some room when they are packed
ROWS = [row(number, f"q{number * 7919 % 10007}") for number in range(3000)]
TEXT = b"".join(ROWS)
ARRAY = b"[" + b",\n".join(line.strip() for line in ROWS) + b"]"
RECORDS = b"query,response\n" + b"".join(b'"q\n%d",r%d\n' % (n, n * n % 9973) for n in range(3000))


def cut(packed: bytes) -> bytes:
    return packed[: len(packed) * 2 // 3]


def flip(packed: bytes, at: int) -> bytes:
    return packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at:][1:]


def zstd(text: bytes) -> bytes:
    command = shutil.which("zstd")
    if command is None:
        pytest.skip("needs the zstd command to pack a file")
    return subprocess.run([command, "-c"], input=text, capture_output=True, check=True).stdout


def damaged(name: str) -> bytes:
    kind = name.split(".")[0]
    if kind == "zst":
        return cut(zstd(TEXT))
    plain = {"array": ARRAY, "csv": RECORDS}.get(kind, TEXT)
    packed = gzip.compress(plain)
    if kind == "checksum":
        return flip(packed, len(packed) - 6)
    if kind == "trailer":
        return packed[:-4]
    if kind == "junk":
        return packed + b"and more"
    return cut(packed)


DAMAGED = {
    "tail.jsonl.gz": "the gzip stream breaks off at byte",
    "trailer.jsonl.gz": "the gzip stream breaks off at byte",
    "checksum.jsonl.gz": "the checksum of the gzip stream from byte 0 to",
    "junk.jsonl.gz": "what follows the gzip stream at byte",
    "array.json.gz": "the gzip stream breaks off at byte",
    "csv.csv.gz": "the gzip stream breaks off at byte",
    "zst.jsonl.zst": "the zstd stream breaks off at byte",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_packed_file_that_is_damaged_gives_the_rows_before_and_says_so(
    encoder: Encoder, tmp_path: Path, name: str
) -> None:
    path, quarantine = tmp_path / name, tmp_path / "quarantine.jsonl"
    path.write_bytes(damaged(name))
    lines_of_row = 2 if "csv" in name else 1
    is_whole = name.startswith(("checksum", "junk", "trailer"))
    # the second time from the index that was kept
    for loader in (BatchLoader, BatchLoader, StreamLoader):
        report = counts(
            loader(
                path, encoder, on_bad_row="quarantine", quarantine=quarantine, return_tensors="np"
            )
        )
        good = report["examples"]
        assert good == 3000 if is_whole else 1000 < good < 2900
        assert (report["rows"], report["bad"]) == (good + 1, 1)
        (kept,) = [json.loads(line) for line in quarantine.read_text().splitlines()]
        line, begins = kept["line"], 1 + lines_of_row * good + ("csv" in name)
        assert begins <= line < begins + lines_of_row
        assert (kept["path"], kept["row"]) == (str(path), None)
        found = message(loader, path, encoder)
        assert found == f"{name}:{line}: {kept['reason']}"
        assert found.startswith(f"{name}:{line}: {DAMAGED[name]}")
        number = f"{good} rows" if loader is BatchLoader else "the rows"
        assert found.endswith(f"; {number} before it can be read: write or fetch the file again")
        quarantine.unlink()


@pytest.mark.parametrize("loader", LOADERS)
def test_damage_before_the_first_row_is_told_for_what_it_is(
    encoder: Encoder, tmp_path: Path, loader: Loader
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT)[:30])
    for on_bad_row in ("raise", "skip"):
        assert "the gzip stream breaks off at byte 30; " in message(
            loader, path, encoder, on_bad_row=on_bad_row
        )


@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_file_among_others_costs_no_other_row(
    encoder: Encoder, tmp_path: Path, loader: Loader
) -> None:
    for number, text in enumerate((TEXT, TEXT, TEXT)):
        packed = gzip.compress(text)
        (tmp_path / f"{number}.jsonl.gz").write_bytes(cut(packed) if number == 1 else packed)
    report = counts(loader(f"{tmp_path}/*.gz", encoder, on_bad_row="skip", return_tensors="np"))
    assert 7000 < report["examples"] < 9000
    assert (report["rows"], report["bad"]) == (report["examples"] + 1, 1)


HALF = "which is half a character; write the character itself or both halves"
NO_TEXT = {
    "nul": (
        b'{"query": "q\0", "response": "a"}',
        "2:13: a NUL byte in the text; the file was not written whole, write it again",
    ),
    "latin-1": (
        '{"query": "café", "response": "a"}'.encode("latin-1"),
        "2:15: byte 0xe9 is not UTF-8; convert the file, for example with iconv -t UTF-8",
    ),
    "byte-order mark": (
        b"\xef\xbb\xbf" + GOOD,
        "2:1: not JSON: a byte-order mark inside the file, where another begins; remove it",
    ),
    "second key": (
        b'{"query": "q", "query": "z", "response": "a"}',
        '2:16: a second key "query" in one object; keep one of them',
    ),
    "second key inside": (
        b'{"query": "q", "response": "a", "x": {"\\u0061": 1, "a": 2}}',
        '2:52: a second key "a" in one object; keep one of them',
    ),
    "high surrogate": (
        '{"query": "你\\ud83d", "response": "a"}'.encode(),
        f"2:13: not JSON: a lone surrogate \\ud83d, {HALF}",
    ),
    "low surrogate": (
        b'{"query": "\\uDE00", "response": "a"}',
        f"2:12: not JSON: a lone surrogate \\uDE00, {HALF}",
    ),
    "long integer": (
        b'{"query": "q", "response": "a", "id": 18446744073709551616}',
        "2:39: the integer 18446744073709551616 does not fit into 64 bits and would lose digits; write it as a string",
    ),
    "long negative": (
        b'{"query": "q", "response": "a", "id": -9223372036854775809}',
        "2:39: the integer -9223372036854775809 does not fit into 64 bits and would lose digits; write it as a string",
    ),
    "large number": (
        b'{"query": "q", "response": "a", "id": 1e400}',
        "2:43: not JSON: a number that 64 bits cannot hold; write it as a string",
    ),
    "control character": (
        b'{"query": "q\x07", "response": "a"}',
        "2:13: not JSON: the control character 0x07 in a string; write it as \\u0007",
    ),
    "two rows": (
        GOOD + GOOD,
        "2:32: not JSON: text after the end of the row; write one row a line",
    ),
    "depth": (
        b'{"query": "q", "response": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "2:164: a value nested deeper than 127 levels; flatten it",
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NO_TEXT)
def test_a_line_that_no_parser_should_take_is_named_and_kept(
    encoder: Encoder, tmp_path: Path, name: str, loader: Loader
) -> None:
    line, expected = NO_TEXT[name]
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    assert message(loader, path, encoder) == f"rows.jsonl:{expected}"
    report = counts(
        loader(path, encoder, on_bad_row="quarantine", quarantine=quarantine, return_tensors="np")
    )
    assert (report["rows"], report["examples"], report["bad"]) == (3, 2, 1)
    kept = json.loads(quarantine.read_text(encoding="utf-8"))
    assert f"{kept['line']}:{kept['column']}: {kept['reason']}" == expected
    # what is not UTF-8 is kept as it is too
    assert (bytes.fromhex(kept["bytes"]) if kept["row"] is None else kept["row"].encode()) == line


@pytest.mark.parametrize("loader", LOADERS)
def test_numbers_at_the_end_of_64_bits_and_pairs_of_surrogates_are_fine(
    encoder: Encoder, tmp_path: Path, loader: Loader
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [GOOD[:-1] + b', "id": %d}' % number for number in (2**64 - 1, -(2**63), 0)]
    rows.append(b'{"query": "\\ud83d\\ude00\\u0000", "response": "a"}')
    path.write_bytes(b"\n".join(rows))
    assert counts(loader(path, encoder, return_tensors="np"))["examples"] == 4


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_the_nul_bytes_of_a_crash_are_one_wrong_row(
    encoder: Encoder, tmp_path: Path, name: str, loader: Loader
) -> None:
    text = {
        "rows.jsonl": GOOD + b"\n" + GOOD + b"\n",
        "rows.json": b"[" + GOOD + b",\n" + GOOD + b",\n",
        "rows.csv": b"query,response\nq,a\n",
    }[name]
    path = tmp_path / name
    path.write_bytes(text + bytes(100_000))
    expected = (
        f"{name}:3: NUL bytes where a row should be: the file was not written whole (a crash or a full disk); write it "
        "again, or remove this line"
    )
    assert message(loader, path, encoder) == expected
    report = counts(loader(path, encoder, on_bad_row="skip", return_tensors="np"))
    good = 1 if name == "rows.csv" else 2
    assert (report["rows"], report["examples"], report["bad"]) == (good + 1, good, 1)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_line_endings_change_nothing(
    encoder: Encoder, tmp_path: Path, loader: Loader, ending: bytes, mark: bytes
) -> None:
    texts = {
        "a.jsonl": GOOD + ending + ending + GOOD + ending + b'{"no": 1}' + ending,
        "b.json": b"["
        + GOOD
        + b","
        + ending
        + ending
        + GOOD
        + b","
        + ending
        + b'{"no": 1}]'
        + ending,
        "c.csv": ending.join([b"query,response", b"q,a", b"q,a", b'q,""', b""]),
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(mark + text)
        assert message(loader, path, encoder).startswith(f"{name}:4:")
        batches = list(
            loader(path, encoder, on_bad_row="skip", mode="sequential", return_tensors="np")
        )
        assert [batch["input_ids"].tolist() for batch in batches] == [
            [encoder.encode(GOOD).input_ids.tolist()]
        ] * 2


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("encoding", "called"), [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32")]
)
def test_a_file_in_another_unicode_is_named_with_its_remedy(
    encoder: Encoder, tmp_path: Path, loader: Loader, encoding: str, called: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD.decode() + "\n").encode(encoding))
    expected = f"rows.jsonl:1: the file is {called}; convert it with iconv -f {called} -t UTF-8"
    for on_bad_row in ("raise", "skip"):
        assert message(loader, path, encoder, on_bad_row=on_bad_row) == expected
