"""A file that changes while it is in use: what was indexed goes on unharmed, or an error says so; never other rows."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_files import questions, row, write_rows
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import RowError

# far more than what is read ahead
ROWS = range(6000)
OLD = {f"old {number}" for number in ROWS}


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))


def begin(loader: BatchLoader | StreamLoader) -> tuple[Iterator[dict[str, Any]], dict[str, Any]]:
    batches = iter(loader)
    return batches, next(batches)


def take(seen: list[str], encoder: Encoder, batches: Iterator[dict[str, Any]]) -> None:
    for batch in batches:
        seen += questions(encoder, [batch])


def open_loader(path: Path, encoder: Encoder, **settings: Any) -> BatchLoader:
    return BatchLoader(path, encoder, batch_size=2, num_threads=1, return_tensors="np", **settings)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"".join(row(number, "new") for number in range(100)) + b'{"query": "to')


def replace(path: Path) -> None:
    write_rows(path.with_name("other"), ROWS, "new").replace(path)


def overwrite(path: Path) -> None:
    # the same bytes but for one letter each, at the same places
    with path.open("r+b") as file:
        file.write(b"".join(row(number, "new") for number in ROWS))


@pytest.mark.parametrize("change", [append, replace, Path.unlink])
@pytest.mark.parametrize("mode", ["bucket", "sequential"])
def test_the_rows_that_were_indexed_go_on_where_their_bytes_are_untouched(
    encoder: Encoder, tmp_path: Path, change: Callable[[Path], None], mode: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    loader = open_loader(path, encoder, mode=mode)
    batches, first = begin(loader)
    change(path)
    seen = list(questions(encoder, [first, *batches]))
    assert len(seen) == len(ROWS)
    assert set(seen) == OLD


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_other_bytes_in_place_are_an_error_with_the_line(
    encoder: Encoder, tmp_path: Path, on_bad_row: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    batches, first = begin(open_loader(path, encoder, mode="sequential", on_bad_row=on_bad_row))
    overwrite(path)
    seen = list(questions(encoder, [first]))
    with pytest.raises(
        RowError, match="the file changed while it was in use; start the run"
    ) as caught:
        take(seen, encoder, batches)
    assert set(seen) <= OLD
    assert caught.value.path == str(path)
    # the rows before the line were handed out, those after it were not
    assert caught.value.line is not None
    assert 0 <= caught.value.line - 1 - len(seen) < 2


def test_a_file_that_was_cut_is_an_error_that_names_it(encoder: Encoder, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    batches, first = begin(open_loader(path, encoder))
    os.truncate(path, path.stat().st_size // 3)
    seen = list(questions(encoder, [first]))
    with pytest.raises(RowError, match=f"{path}.*: the file changed while it was in use"):
        take(seen, encoder, batches)
    assert set(seen) <= OLD


def test_a_replaced_file_among_more_than_can_be_open_is_an_error(
    encoder: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    files = [write_rows(folder / f"{file:03}.jsonl", [file]) for file in range(200)]
    batches, first = begin(open_loader(folder, encoder, mode="sequential"))
    for path in files[50:]:
        write_rows(folder / "other", [0], "new").replace(path)
    seen = list(questions(encoder, [first]))
    # opened again, the first of them is another file
    with pytest.raises(RowError, match=f"{files[50]}.*: the file changed while it was in use"):
        take(seen, encoder, batches)
    assert seen == [f"old {file}" for file in range(50)]


@pytest.mark.parametrize("packed", ["gz", "plain"])
def test_a_packed_file_was_unpacked_before_it_changed(
    encoder: Encoder, tmp_path: Path, packed: str
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    text = b"".join(map(row, ROWS))
    path.write_bytes(gzip.compress(text, 1) if packed == "gz" else text)
    batches, first = begin(open_loader(path, encoder))
    path.with_name("other").write_bytes(b"")
    path.with_name("other").replace(path)
    assert set(questions(encoder, [first, *batches])) == OLD


def test_the_next_epoch_and_the_next_start_see_what_is_there_then(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", range(50))
    loader = open_loader(path, encoder)
    assert loader.num_rows == len(set(questions(encoder, loader))) == 50
    append(path)
    # an epoch has the rows that were indexed, a start those that are there
    assert len(set(questions(encoder, loader))) == 50
    again = open_loader(path, encoder, on_bad_row="skip")
    assert (again.num_rows, again.report["bad"]) == (150, 1)


# far more than the buffers of a stream
LONG = range(25_000)


def stream(path: Path, encoder: Encoder, **settings: Any) -> StreamLoader:
    return StreamLoader(
        path,
        encoder,
        shuffle_buffer_size=20,
        batch_size=2,
        num_threads=1,
        return_tensors="np",
        **settings,
    )


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
@pytest.mark.parametrize("place", ["between rows", "inside a row"])
def test_a_stream_that_ends_before_its_file_did_is_an_error(
    encoder: Encoder, tmp_path: Path, on_bad_row: str, place: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", LONG)
    batches, first = begin(stream(path, encoder, on_bad_row=on_bad_row))
    half = sum(len(row(number)) for number in LONG[: len(LONG) // 2])
    os.truncate(path, half - (7 if place == "inside a row" else 0))
    seen = list(questions(encoder, [first]))
    with pytest.raises(OSError, match=f"{path}:1250.: the file became shorter while it was in use"):
        take(seen, encoder, batches)
    assert len(seen) == len(set(seen))
    assert set(seen) <= {f"old {number}" for number in LONG[: len(LONG) // 2]}


def test_a_stream_takes_each_row_once_as_it_then_is(encoder: Encoder, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", LONG)
    batches, first = begin(stream(path, encoder, mode="sequential"))
    with path.open("r+b") as file:
        file.write(b"".join(row(number, "new") for number in LONG))
    append(path)
    seen = list(questions(encoder, [first]))
    with pytest.raises(RowError, match=f"{path}:{len(LONG) + 101}:"):  # the row that is half there
        take(seen, encoder, batches)
    old = sum(text.startswith("old") for text in seen)
    assert 0 < old < len(seen) > len(LONG)
    words = ["old"] * old + ["new"] * (len(seen) - old)
    numbers = [*LONG, *range(100)]
    assert seen == [f"{word} {number}" for word, number in zip(words, numbers, strict=False)]
