"""Wrong rows: an error, left out and counted, or kept in a file for a person to mend; never lost in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError, RowError

GOOD = json.dumps({"query": "q", "response": "a"})
BAD = [
    '{"query": "q"',
    '{"query": "q", "response": ""}',
    '{"query": "q", "response": " "}',
    '{"id": 3}',
    '{"query": "é", "response": 7}',
]


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, *BAD, *[GOOD] * 94]))
    return path


def test_the_first_wrong_row_is_an_error_by_default(encoder: Encoder, rows: Path) -> None:
    with pytest.raises(RowError, match=rf"{rows}:2:\d+: not JSON"):
        BatchLoader(rows, encoder, return_tensors="np")


def test_rows_left_out_are_counted_by_reason(encoder: Encoder, rows: Path) -> None:
    for _ in range(2):  # also from the index that was kept
        report = BatchLoader(rows, encoder, on_bad_row="skip", return_tensors="np").report
        assert (report["rows"], report["examples"], report["bad"]) == (100, 95, 5)
        assert sum(report["bad_reasons"].values()) == 5
        empty = '"response" is an empty assistant turn, which would teach the model to say nothing'
        assert next(iter(report["bad_reasons"].items())) == (empty, 2)
        assert [text.split(":")[1] for text in report["first_bad"]] == ["2", "3", "4", "5", "6"]


def test_a_later_start_that_allows_no_wrong_rows_says_so(encoder: Encoder, rows: Path) -> None:
    BatchLoader(rows, encoder, on_bad_row="skip", return_tensors="np")
    with pytest.raises(RowError, match=f"{rows}:2"):
        BatchLoader(rows, encoder, return_tensors="np")


def test_the_quarantine_has_place_reason_and_the_row_as_it_was(
    encoder: Encoder, rows: Path, tmp_path: Path
) -> None:
    for name in ("one.jsonl", "two.jsonl"):  # the second time from the index that was kept
        quarantine = tmp_path / "out" / name
        loader = BatchLoader(
            rows, encoder, on_bad_row="quarantine", quarantine=quarantine, return_tensors="np"
        )
        kept = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
        assert [row["row"] for row in kept] == BAD
        assert [row["line"] for row in kept] == [2, 3, 4, 5, 6]
        assert all(row["path"] == str(rows) and row["reason"] for row in kept)
        assert kept[4]["pointer"] == "/response"
        assert kept[4]["column"] == BAD[4].index("7") + 1
        assert loader.num_rows == 95
    # mended rows go back in
    quarantine.write_text("\n".join(GOOD for _ in kept))
    assert BatchLoader(quarantine, encoder, return_tensors="np").num_rows == 5


def test_a_run_without_wrong_rows_leaves_no_quarantine_of_an_earlier_one(
    encoder: Encoder, tmp_path: Path
) -> None:
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    path.write_text(GOOD)
    quarantine.write_text("of an earlier run")
    BatchLoader(path, encoder, on_bad_row="quarantine", quarantine=quarantine, return_tensors="np")
    assert not quarantine.exists()


@pytest.mark.parametrize(
    ("limit", "fits"), [("5%", True), ("4.9%", False), (5, True), ("4", False)]
)
def test_more_wrong_rows_than_allowed_are_an_error_with_the_reasons(
    encoder: Encoder, rows: Path, limit: str | int, fits: bool
) -> None:
    def open_loader() -> BatchLoader:
        return BatchLoader(
            rows, encoder, on_bad_row="skip", max_bad_rows=limit, return_tensors="np"
        )

    if fits:
        assert open_loader().num_rows == 95
        return
    with pytest.raises(RowError) as caught:
        open_loader()
    text = str(caught.value)
    assert text.startswith("5 of 100 rows are wrong, and max_bad_rows allows 4 (the first: ")
    assert '\n  2 x "response" is an empty assistant turn' in text


@pytest.mark.parametrize("limit", ["many", "-1", "101%", "1.5"])
def test_a_limit_that_is_none_is_refused(encoder: Encoder, rows: Path, limit: str) -> None:
    with pytest.raises(ConfigError, match=f'max_bad_rows "{limit}" is wrong'):
        BatchLoader(rows, encoder, on_bad_row="skip", max_bad_rows=limit, return_tensors="np")


def test_rows_that_train_nothing_are_refused_and_counted(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    untrained = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "loss": False},
        ]
    }
    trained = json.loads(json.dumps(untrained).replace(', "loss": false', ""))
    path.write_text("\n".join(json.dumps(row) for row in (trained, untrained, trained)))
    with pytest.raises(RowError, match=f"{path}:2: none of the .* tokens is trained"):
        BatchLoader(path, encoder, return_tensors="np")
    report = BatchLoader(path, encoder, on_bad_row="skip", return_tensors="np").report
    assert (report["examples"], report["bad"], report["untrained"]) == (2, 1, 1)


def test_a_wrong_first_row_does_not_hide_the_shape_of_the_file(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([BAD[0], BAD[3], GOOD, GOOD]))
    loader = BatchLoader(path, encoder, on_bad_row="skip", return_tensors="np")
    assert (loader.num_rows, loader.report["bad"]) == (2, 2)


def test_a_disk_that_is_full_while_the_quarantine_is_written_is_an_error(
    shared_data: Path, rows: Path, tmp_path: Path
) -> None:
    script = """
import resource, sys
from sftcore.data import BatchLoader, Encoder
encoder = Encoder.from_pretrained(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    BatchLoader(sys.argv[2], encoder, on_bad_row="quarantine", quarantine=sys.argv[3], cache=False)
except OSError as error:
    print(error)
"""
    quarantine = tmp_path / "quarantine.jsonl"
    folder = shared_data / "tokenizers" / "smollm2"
    shown = subprocess.run(
        [sys.executable, "-c", script, folder, rows, quarantine],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{quarantine}: the quarantine file cannot be written: File too large" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
