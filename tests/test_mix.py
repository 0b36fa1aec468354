"""Several data sets in one epoch, by rows or by trained tokens, and rows that come twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


def write(path: Path, count: int, words: int, start: int = 0) -> Path:
    lines = (
        json.dumps({"query": f"{path.stem} {number}", "response": "word " * (words + number % 5)})
        for number in range(start, start + count)
    )
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    return [write(folder / "short.jsonl", 400, 3), write(folder / "long.jsonl", 60, 60)]


def test_without_shares_an_epoch_is_all_rows_once(encoder: Encoder, sets: list[Path]) -> None:
    loader = BatchLoader(sets, encoder, return_tensors="np")
    assert [part["examples"] for part in loader.report["epoch"]] == [400, 60]
    assert sorted(row for step in loader.plan(0) for row in step) == list(range(460))


def test_shares_of_rows_are_exact(encoder: Encoder, sets: list[Path]) -> None:
    loader = BatchLoader(sets, encoder, mix=[0.5, 0.5], return_tensors="np")
    assert [part["examples"] for part in loader.report["epoch"]] == [60, 60]
    first, second = (sorted(row for step in loader.plan(epoch) for row in step) for epoch in (0, 1))
    assert first != second
    assert len(set(first)) == 120
    repeated = BatchLoader(
        sets,
        encoder,
        mix=[0.5, 0.5],
        stopping_strategy="all_exhausted",
        return_tensors="np",
    )
    assert [part["examples"] for part in repeated.report["epoch"]] == [400, 400]


@pytest.mark.parametrize("mode", ["bucket", "pack", "sequential"])
def test_shares_of_trained_tokens_are_met(encoder: Encoder, sets: list[Path], mode: str) -> None:
    loader = BatchLoader(
        sets,
        encoder,
        mix=[0.7, 0.3],
        mix_by="tokens",
        mode=mode,
        batch_size=4 if mode != "pack" else 1,
        return_tensors="np",
    )
    for epoch in range(3):
        loader.set_epoch(epoch)
        trained = [part["trained_tokens"] for part in loader.report["epoch"]]
        assert trained[0] / sum(trained) == pytest.approx(0.7, abs=0.02)
        # what is counted is what comes
        handed_out = sum((batch["labels"][:, :] != -100).sum() for batch in loader)
        assert handed_out == sum(trained)


def test_steps_are_known_ahead_where_epochs_differ(encoder: Encoder, sets: list[Path]) -> None:
    loader = BatchLoader(
        sets, encoder, mix=[0.7, 0.3], mix_by="tokens", batch_size=3, return_tensors="np"
    )
    counted = loader.num_steps(3)
    assert counted == sum(sum(1 for _ in loader) for _ in range(3))
    assert loader.num_steps(2.5) < counted


def test_a_share_for_each_data_set_is_needed(encoder: Encoder, sets: list[Path]) -> None:
    with pytest.raises(ConfigError, match="mix: 1 shares for 2 data sets; expected one each"):
        len(BatchLoader(sets, encoder, mix=[1.0], return_tensors="np"))


def test_equal_rows_are_left_out_once_and_counted(encoder: Encoder, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", 20, 3), write(tmp_path / "b.jsonl", 5, 3)
    # the same rows written with other spaces are the same to the model
    again = [
        json.dumps(json.loads(line), indent=None, separators=(",", ":"))
        for line in one.read_text().splitlines()
    ]
    two.write_text(two.read_text() + "\n" + "\n".join(again[:7]))
    loader = BatchLoader([one, two], encoder, dedup="exact", return_tensors="np")
    assert loader.num_rows == 25
    assert loader.report["duplicates"] == 7
    assert [part["duplicates"] for part in loader.report["sets"]] == [0, 7]
    assert BatchLoader([one, two], encoder, return_tensors="np").num_rows == 32


def test_rows_that_are_nearly_equal_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(200)]
    texts = [words, [*words[:100], "other", *words[101:]], list(reversed(words))]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"query": "q", "response": " ".join(text)}) for text in texts)
    )
    loader = BatchLoader(path, encoder, dedup="near", mode="sequential", return_tensors="np")
    assert (loader.num_rows, loader.report["near_duplicates"]) == (2, 1)
    assert [loader.place(row)[1] for row in range(2)] == [1, 3]


def test_rows_of_the_validation_set_are_reported_and_left_out(
    encoder: Encoder, tmp_path: Path
) -> None:
    train, held_out = write(tmp_path / "a.jsonl", 30, 3), tmp_path / "v.jsonl"
    held_out.write_text("\n".join(train.read_text().splitlines()[10:14]))
    validation = BatchLoader(held_out, encoder, return_tensors="np")
    loader = BatchLoader(train, encoder, validation=validation, return_tensors="np")
    assert loader.report["overlap"] == 4
    assert loader.num_rows == 30
    assert [loader.place(found.row)[1] for found in loader.overlaps] == [11, 12, 13, 14]
    assert [validation.place(found.other)[1] for found in loader.overlaps] == [1, 2, 3, 4]
    cleaned = BatchLoader(train, encoder, validation=validation, dedup="exact", return_tensors="np")
    assert (cleaned.num_rows, cleaned.report["left_out"]) == (26, 4)
    seen = {cleaned.place(row)[1] for step in cleaned.plan(0) for row in step}
    assert seen == set(range(1, 31)) - {11, 12, 13, 14}


def test_nearly_equal_validation_rows_are_found_where_asked(
    encoder: Encoder, tmp_path: Path
) -> None:
    words = [f"word{number}" for number in range(200)]
    train, held_out = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
    train.write_text(json.dumps({"query": "q", "response": " ".join(words)}))
    words[50] = "other"
    held_out.write_text(json.dumps({"query": "q", "response": " ".join(words)}))
    validation = BatchLoader(held_out, encoder, return_tensors="np")
    loader = BatchLoader(train, encoder, return_tensors="np")
    assert loader.overlap(validation) == []
    assert [found.is_exact for found in loader.overlap(validation, near=True)] == [False]


def test_a_row_stays_on_its_side_of_the_split_when_rows_are_appended(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", 300, 3)

    def held_out() -> set[int]:
        loader = BatchLoader(
            path, encoder, split="validation", split_ratio=0.1, return_tensors="np"
        )
        return {loader.place(row)[1] for step in loader.plan(0) for row in step}

    before = held_out()
    assert 10 < len(before) < 60
    with path.open("a") as file:
        file.writelines(
            "\n" + json.dumps({"query": f"more {number}", "response": "x"}) for number in range(200)
        )
    assert {line for line in held_out() if line <= 300} == before
