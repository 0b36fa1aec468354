"""Every kind of file gives the same examples, in order, names wrong rows by their lines, and loses none."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fault_files import counts
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import RowError

LOADERS = [BatchLoader, StreamLoader]
Loader = type[BatchLoader] | type[StreamLoader]
Row = dict[str, str]

ROWS: list[Row] = [
    {
        "query": f'row {number}, "quoted"; 你好\t{"é" * number}',
        "response": f"answer {number}\nsecond line",
    }
    for number in range(50)
]


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=256)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(rows: list[Row]) -> bytes:
    return ("[" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]").encode()


def records(delimiter: str) -> Callable[[list[Row]], bytes]:
    def write(rows: list[Row]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(
            text, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return write


def columnar(rows: list[Row]) -> bytes:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow to write parquet")
    pyarrow = pytest.importorskip("pyarrow")
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


def zstd(text: bytes) -> bytes:
    command = shutil.which("zstd")
    if command is None:
        pytest.skip("needs the zstd command to pack a file")
    return subprocess.run([command, "-c"], input=text, capture_output=True, check=True).stdout


TEXT_KINDS = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": array,
    ".csv": records(","),
    ".tsv": records("\t"),
}
KINDS: dict[str, Callable[[list[Row]], bytes]] = {**TEXT_KINDS, ".parquet": columnar}
for _kind, _write in TEXT_KINDS.items():
    KINDS[f"{_kind}.gz"] = lambda rows, write=_write: gzip.compress(write(rows))
    KINDS[f"{_kind}.zst"] = lambda rows, write=_write: zstd(write(rows))
# the line of the row with this number, from 0; that of parquet is the number of the row
LINES = {
    ".csv": lambda rows, number: 2 + sum(1 + row_breaks(row) for row in rows[:number]),
    ".tsv": lambda rows, number: 2 + sum(1 + row_breaks(row) for row in rows[:number]),
}


def row_breaks(row: Row) -> int:
    return sum(value.count("\n") for value in row.values())


def line_of(kind: str, rows: list[Row], number: int) -> int:
    plain = kind.removesuffix(".gz").removesuffix(".zst")
    return LINES.get(plain, lambda rows, number: number + 1)(rows, number)


def write(path: Path, kind: str, rows: list[Row]) -> Path:
    path = path.with_name(path.name + kind)
    path.write_bytes(KINDS[kind](rows))
    return path


def examples(loader: BatchLoader | StreamLoader) -> list[tuple[list[int], list[int]]]:
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in loader]


def expected(encoder: Encoder, rows: list[Any]) -> list[tuple[list[int], list[int]]]:
    found = encoder.encode_batch(rows)
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in found]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_file_gives_the_same_examples_and_the_right_lines(
    encoder: Encoder, tmp_path: Path, kind: str, loader: Loader
) -> None:
    path = write(tmp_path / "rows", kind, ROWS)
    opened = loader(path, encoder, mode="sequential", return_tensors="np")
    assert examples(opened) == expected(encoder, ROWS)
    if isinstance(opened, BatchLoader):
        places = [opened.place(row) for row in range(50)]
        assert places == [(path, line_of(kind, ROWS, number)) for number in range(50)]
    # a wrong row is named by its line too
    wrong = [*ROWS[:20], {"query": "q", "response": ""}, *ROWS[20:]]
    path = write(tmp_path / "wrong", kind, wrong)
    with pytest.raises(RowError, match='"response" is an empty assistant turn') as caught:
        examples(loader(path, encoder, return_tensors="np"))
    assert (caught.value.path, caught.value.line) == (str(path), line_of(kind, wrong, 20))
    skipping = loader(path, encoder, on_bad_row="skip", mode="sequential", return_tensors="np")
    assert examples(skipping) == expected(encoder, ROWS)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_list_and_a_folder_of_all_kinds_give_every_row_of_each(
    encoder: Encoder, tmp_path: Path, loader: Loader
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    kinds = [kind for kind in KINDS if "parquet" not in kind and "zst" not in kind]
    paths = [write(folder / str(number), kind, ROWS) for number, kind in enumerate(kinds)]
    once = expected(encoder, ROWS)
    for dataset in (paths, folder, f"{folder}/*"):
        opened = loader(dataset, encoder, mode="sequential", return_tensors="np")
        assert examples(opened) == once * len(paths)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_text_is_a_document_a_line(
    encoder: Encoder, tmp_path: Path, packed: str, loader: Loader
) -> None:
    documents = [f'document {number}, "as it is"\t你好' for number in range(50)]
    text = "\n".join(documents).encode()
    path = tmp_path / f"rows.txt{packed}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstd}[packed](text))
    opened = loader(path, encoder, mode="sequential", return_tensors="np")
    assert examples(opened) == expected(encoder, [{"text": text} for text in documents])


GOOD = st.integers(0, 5).map(lambda number: {"query": f"q{number}", "response": "a"})
LONG = st.just({"query": "q", "response": "word " * 400})
WRONG = st.sampled_from([{"query": "q", "response": ""}, {"query": "q", "response": " "}])
FILE = st.tuples(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz"]),
    st.lists(st.one_of(GOOD, GOOD, LONG, WRONG), max_size=12),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=st.lists(FILE, min_size=1, max_size=4))
def test_every_row_is_an_example_or_is_counted_as_what_it_is_not(
    encoder: Encoder, tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, list[Row]]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    first = {"query": "the first", "response": "a"}
    paths = [
        write(folder / str(number), kind, [first, *rows])
        for number, (kind, rows) in enumerate(files)
    ]
    rows = [row for _, rows in files for row in [first, *rows]]
    good = [row["query"] for row in rows if row["response"] == "a"]
    deleted = sum(len(row["response"]) > 1000 for row in rows)
    bad = len(rows) - len(good) - deleted
    for dedup in ("none", "exact"):
        loader = BatchLoader(
            paths, encoder, on_bad_row="skip", dedup=dedup, cache=False, return_tensors="np"
        )
        report = loader.report
        assert (report["rows"], report["bad"], report["deleted"]) == (len(rows), bad, deleted)
        left = len(set(good)) if dedup == "exact" else len(good)
        assert report["examples"] == len(examples(loader)) == left
        assert report["duplicates"] == len(good) - left
        names = ("examples", "deleted", "bad", "duplicates")
        assert sum(report[name] for name in names) == len(rows)
        assert sum(part["rows"] for part in report["sets"]) == len(rows)
    streamed = StreamLoader(paths, encoder, on_bad_row="skip", return_tensors="np")
    counts(streamed)
    totals = {
        name: sum(part[name] for part in streamed.report["sets"])
        for name in ("rows", "examples", "deleted", "bad")
    }
    assert totals == {"rows": len(rows), "examples": len(good), "deleted": deleted, "bad": bad}
