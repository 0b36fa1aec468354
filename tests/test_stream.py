"""Data that is read once and in order: every row comes, a state goes on, ranks share the same batches."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.data import Encoder, StreamLoader
from sftcore.errors import ConfigError, RowError


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=128)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    paths = []
    for name, count in (("a.jsonl", 130), ("b.jsonl.gz", 40)):
        text = "\n".join(
            json.dumps({"query": f"{name[0]}{number}", "response": "w " * (1 + number * 7 % 60)})
            for number in range(count)
        )
        path = folder / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        paths.append(path)
    return paths


def open_ranks(
    sets: list[Path], encoder: Encoder, world_size: int, accumulation: int, **settings: Any
) -> list[StreamLoader]:
    return [
        StreamLoader(
            sets,
            encoder,
            batch_size=2,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world_size,
            return_tensors="np",
            return_rows=True,
            **settings,
        )
        for rank in range(world_size)
    ]


def questions(loader: StreamLoader, batch: dict[str, Any]) -> list[str]:
    text = loader.encoder.decode(batch["input_ids"].ravel(), skip_special_tokens=False)
    return [part.split("<")[0] for part in text.split("<|im_start|>user\n")[1:]]


def steps_of(loaders: list[StreamLoader]) -> list[list[str]]:
    """The questions of each step of the rest of an epoch, put together from all ranks."""
    accumulation = loaders[0]._accumulation
    batches = [[questions(loader, batch) for batch in loader] for loader in loaders]
    return [
        sorted(
            text
            for rank in batches
            for found in rank[start : start + accumulation]
            for text in found
        )
        for start in range(0, len(batches[0]), accumulation)
    ]


SHAPES: list[dict[str, Any]] = [
    {"mode": "bucket", "shuffle_buffer_size": 30},
    {"mode": "pack", "shuffle_buffer_size": 50},
    {"mode": "sequential", "shuffle_buffer_size": 20},
    {"mode": "bucket", "shuffle_buffer_size": 1000},
    {"mode": "bucket", "shuffle_buffer_size": 25, "mix": [0.5, 0.5]},
]


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_every_row_comes_once_an_epoch(
    encoder: Encoder, sets: list[Path], shape: dict[str, Any]
) -> None:
    loader = open_ranks(sets, encoder, 1, 2, **shape)[0]
    expected = sorted(
        [f"a{number}" for number in range(130)] + [f"b{number}" for number in range(40)]
    )
    first, second = (steps_of([loader]) for _ in range(2))
    for epoch in (first, second):
        assert sorted(text for step in epoch for text in step) == expected
    assert (first == second) == (shape["mode"] == "sequential")
    assert [part["examples"] for part in loader.report["sets"]] == [260, 80]


def test_without_shuffling_the_order_of_the_files_is_kept(
    encoder: Encoder, sets: list[Path]
) -> None:
    loader = open_ranks(sets, encoder, 1, 1, mode="sequential", shuffle_buffer_size=7)[0]
    seen = [text for batch in loader for text in questions(loader, batch)]
    assert seen == [f"a{number}" for number in range(130)] + [f"b{number}" for number in range(40)]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), worlds=st.permutations([(1, 4), (2, 2), (4, 1)]), data=st.data()
)
def test_a_stream_goes_on_from_any_step_on_any_number_of_ranks(
    encoder: Encoder,
    sets: list[Path],
    shape: dict[str, Any],
    worlds: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    uninterrupted = open_ranks(sets, encoder, *worlds[0], **shape)
    whole = steps_of(uninterrupted)
    ledger = uninterrupted[0].take_ledger()
    stop = data.draw(st.integers(1, len(whole) - 1))
    first = open_ranks(sets, encoder, *worlds[1], **shape)
    for loader in first:
        for taken, _ in enumerate(loader, 1):
            if taken == stop * worlds[1][1]:
                break
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in first}
    assert len(states) == 1
    state = json.loads(states.pop())
    assert state["ledger"] == ledger[stop - 1].chain
    resumed = open_ranks(sets, encoder, *worlds[2], **shape)
    for loader in resumed:
        loader.load_state_dict(state)
    assert steps_of(resumed) == whole[stop:]
    assert [entry.chain for entry in resumed[0].take_ledger()] == [
        entry.chain for entry in ledger[stop:]
    ]


def test_shares_take_rows_in_turn(encoder: Encoder, sets: list[Path]) -> None:
    loader = open_ranks(
        sets, encoder, 1, 1, mix=[0.75, 0.25], mode="sequential", shuffle_buffer_size=8
    )[0]
    seen = [text[0] for batch in loader for text in questions(loader, batch)]
    assert seen[:8].count("b") == 2
    # the epoch ends with the first data set that is used up
    assert seen.count("a") == 130 or seen.count("b") == 40
    assert seen.count("b") / len(seen) == pytest.approx(0.25, abs=0.01)
    again = open_ranks(
        sets, encoder, 1, 1, mix=[0.5, 0.5], stopping_strategy="all_exhausted", mode="sequential"
    )[0]
    seen = [text for batch in again for text in questions(again, batch)]
    assert {f"a{number}" for number in range(130)} <= set(seen)
    assert sum(text[0] == "b" for text in seen) == pytest.approx(130, abs=1)


def test_wrong_rows_are_an_error_or_counted_and_kept(
    encoder: Encoder, sets: list[Path], tmp_path: Path
) -> None:
    path, quarantine = tmp_path / "rows.jsonl", tmp_path / "quarantine.jsonl"
    lines = sets[0].read_text().splitlines()
    lines[40:40] = ['{"query": "q"', '{"id": 3}']
    path.write_text("\n".join(lines))
    with pytest.raises(RowError, match=f"{path}:41:"):
        list(StreamLoader(path, encoder, return_tensors="np"))
    loader = StreamLoader(
        path, encoder, on_bad_row="quarantine", quarantine=quarantine, return_tensors="np"
    )
    list(loader)
    assert (loader.report["sets"][0]["examples"], loader.report["sets"][0]["bad"]) == (130, 2)
    kept = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(row["line"], row["row"]) for row in kept] == [(41, lines[40]), (42, lines[41])]
    with pytest.raises(RowError, match="2 of the first 42 rows are wrong, more than max_bad_rows"):
        list(StreamLoader(path, encoder, on_bad_row="skip", max_bad_rows=1, return_tensors="np"))


def test_a_state_of_other_files_is_refused(encoder: Encoder, sets: list[Path]) -> None:
    state = StreamLoader(sets[0], encoder, return_tensors="np").state_dict()
    with pytest.raises(ConfigError, match="the files changed"):
        StreamLoader(sets, encoder, return_tensors="np").load_state_dict(state)


PIPE = """
import json, sys
from sftcore.data import Encoder, StreamLoader
encoder = Encoder.from_pretrained(sys.argv[1], max_length=128)
loader = StreamLoader("-", encoder, batch_size=4, shuffle_buffer_size=30, return_tensors="np", return_rows=True)
if len(sys.argv) > 2:
    loader.load_state_dict(json.loads(sys.argv[2]))
for number, batch in enumerate(loader, 1):
    print(batch["rows"].tolist(), batch["input_ids"].sum())
    if len(sys.argv) == 2 and number == 20:
        print(json.dumps(loader.state_dict()))
"""


def test_the_standard_input_is_read_and_resumed(
    shared_data: Path, encoder: Encoder, sets: list[Path]
) -> None:
    command = [sys.executable, "-c", PIPE, str(shared_data / "tokenizers" / "smollm2")]

    def run(*state: str) -> list[str]:
        with sets[0].open("rb") as rows:
            return subprocess.run(
                [*command, *state], stdin=rows, capture_output=True, text=True, check=True
            ).stdout.splitlines()

    lines = run()
    state = lines.pop(20)
    assert len(lines) == 33
    assert run(state) == lines[20:]


def test_the_standard_input_needs_a_stream_and_one_process(encoder: Encoder) -> None:
    from sftcore.data import BatchLoader

    with pytest.raises(ConfigError, match="stdin cannot be read twice"):
        BatchLoader("-", encoder)
    with pytest.raises(ConfigError, match="stdin belongs to one process"):
        StreamLoader("-", encoder, world_size=2)
