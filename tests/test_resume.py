"""A run may stop at any step and go on, on other numbers of ranks too, and its ledger proves what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.data import BatchLoader, Encoder
from sftcore.data.run import open_data, save_data
from sftcore.errors import ConfigError


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=256)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    paths = []
    for name, count in (("a", 130), ("b", 40)):
        path = folder / f"{name}.jsonl"
        path.write_text(
            "\n".join(
                json.dumps({"query": f"{name}{number}", "response": "w " * (1 + number * 7 % 60)})
                for number in range(count)
            )
        )
        paths.append(path)
    return paths


SHAPES: list[dict[str, Any]] = [
    {"mode": "bucket"},
    {"mode": "pack"},
    {"mode": "sequential"},
    {"mode": "bucket", "mix": [0.6, 0.4]},
    {"mode": "pack", "mix": [0.6, 0.4], "mix_by": "tokens", "stopping_strategy": "all_exhausted"},
]


def steps_of(loaders: list[BatchLoader], epochs: int) -> list[tuple[int, ...]]:
    """The rows of each step, in order, put together from all ranks."""
    steps: list[tuple[int, ...]] = []
    for _ in range(epochs):
        accumulation = loaders[0]._accumulation
        batches = [[batch["rows"].tolist() for batch in loader] for loader in loaders]
        for start in range(0, len(batches[0]), accumulation):
            found = [
                row
                for rank in batches
                for rows in rank[start : start + accumulation]
                for row in rows
            ]
            steps.append(tuple(sorted(found)))
    return steps


def open_ranks(
    sets: list[Path], encoder: Encoder, world_size: int, accumulation: int, shape: dict[str, Any]
) -> list[BatchLoader]:
    return [
        BatchLoader(
            sets,
            encoder,
            batch_size=2,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world_size,
            return_tensors="np",
            return_rows=True,
            **shape,
        )
        for rank in range(world_size)
    ]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), worlds=st.permutations([(1, 4), (2, 2), (4, 1)]), data=st.data()
)
def test_a_run_goes_on_from_any_step_on_any_number_of_ranks(
    encoder: Encoder,
    sets: list[Path],
    shape: dict[str, Any],
    worlds: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    uninterrupted = open_ranks(sets, encoder, *worlds[0], shape)
    whole = steps_of(uninterrupted, 2)
    ledger = uninterrupted[0].take_ledger()
    assert [entry.step for entry in ledger[:3]] == [0, 1, 2]
    stop = data.draw(st.integers(1, len(whole) - 1))
    first = open_ranks(sets, encoder, *worlds[1], shape)
    for loader in first:
        left = stop * worlds[1][1]
        while left:
            for _ in loader:
                left -= 1
                if not left:
                    break
    states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in first}
    assert len(states) == 1  # every rank stands at the same place
    state = json.loads(states.pop())
    assert len(json.dumps(state)) < 400
    assert state["ledger"] == ledger[stop - 1].chain
    resumed = open_ranks(sets, encoder, *worlds[2], shape)
    for loader in resumed:
        loader.load_state_dict(state)
    rest = steps_of(resumed, 2 - resumed[0]._epoch)
    assert rest == whole[stop:]
    assert [entry.chain for entry in resumed[0].take_ledger()] == [
        entry.chain for entry in ledger[stop:]
    ]


def test_iteration_that_was_left_in_a_step_goes_on_with_its_next_micro_batch(
    encoder: Encoder, sets: list[Path]
) -> None:
    def loader() -> BatchLoader:
        return open_ranks(sets, encoder, 1, 3, {"mode": "bucket"})[0]

    whole = [batch["rows"].tolist() for batch in loader()]
    stopped = loader()
    seen = []
    for batch in stopped:
        seen.append(batch["rows"].tolist())
        if len(seen) == 4:
            break
    assert seen + [batch["rows"].tolist() for batch in stopped] == whole


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("data", r"the rows changed \(170 examples then, 171 now\)"),
        ("encoder", "the tokenizer, the chat template or a setting of the encoder"),
        ("batches", "the seed, the global batch size, the mode, the split or the mix changed"),
    ],
)
def test_a_state_of_something_else_is_refused_with_what_changed(
    encoder: Encoder, shared_data: Path, sets: list[Path], tmp_path: Path, change: str, text: str
) -> None:
    state = BatchLoader(sets, encoder, batch_size=4, return_tensors="np").state_dict()
    state["step"] = 7
    if change == "data":
        longer = tmp_path / "a.jsonl"
        longer.write_text(sets[0].read_text() + '\n{"query": "one", "response": "more"}')
        other = BatchLoader([longer, sets[1]], encoder, batch_size=4, return_tensors="np")
    elif change == "encoder":
        cut = Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=255)
        other = BatchLoader(sets, cut, batch_size=4, return_tensors="np")
    else:
        other = BatchLoader(sets, encoder, batch_size=5, return_tensors="np")
    with pytest.raises(ConfigError, match=text):
        other.load_state_dict(state)
    with pytest.warns(UserWarning, match=text):
        other.load_state_dict(state, allow_data_change=True)
    assert other.state_dict()["step"] == 7


def test_two_runs_with_other_data_have_other_ledgers(
    encoder: Encoder, sets: list[Path], tmp_path: Path
) -> None:
    changed = tmp_path / "a.jsonl"
    changed.write_text(sets[0].read_text().replace('"a77"', '"a78"'))
    ledgers = []
    for path in (sets[0], changed):
        loader = BatchLoader(path, encoder, batch_size=8, return_tensors="np")
        list(loader)
        ledgers.append([entry.examples for entry in loader.take_ledger()])
    assert sum(one != other for one, other in zip(*ledgers, strict=True)) == 1


def test_the_rows_of_a_step_are_looked_up_from_what_a_run_kept(
    encoder: Encoder, sets: list[Path], tmp_path: Path
) -> None:
    from sftcore.data.ledger import append_ledger

    loader = BatchLoader(
        sets,
        encoder,
        batch_size=4,
        mode="pack",
        split="train",
        split_ratio=0.1,
        return_tensors="np",
    )
    save_data(loader, tmp_path)
    handed_out = [loader.global_batch(0, 1), loader.global_batch(1, 2)]
    for _ in range(2):
        list(loader)
    append_ledger(tmp_path / "ledger.jsonl", loader.take_ledger())
    again = open_data(tmp_path)
    assert again.fingerprint == loader.fingerprint
    assert again.report["origin"] == "memo"
    steps = loader.num_steps_of(0)
    for planned, step in zip(handed_out, (2, steps + 3), strict=True):
        command = [sys.executable, "-m", "sftcore.cli", "data", "why", "--run", str(tmp_path)]
        shown = subprocess.run(
            [*command, "--step", str(step), "--json"], capture_output=True, text=True, check=True
        )
        rows = [json.loads(line) for line in shown.stdout.splitlines()]
        assert [row["row"] for row in rows] == [row for pack in planned for row in pack]
        assert [(Path(row["path"]), row["line"]) for row in rows] == [
            loader.place(row) for pack in planned for row in pack
        ]
        assert "these are the examples the step saw" in shown.stderr


def test_a_step_whose_rows_changed_since_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    from sftcore.data.ledger import append_ledger
    from sftcore.data.run import look_up_step

    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "response": "one"}\n')
    loader = BatchLoader(path, encoder, return_tensors="np")
    save_data(loader, tmp_path)
    list(loader)
    append_ledger(tmp_path / "ledger.jsonl", loader.take_ledger())
    seen = look_up_step(tmp_path, 1)
    assert seen.recorded is not None
    assert seen.recorded.examples == seen.hash
    path.write_text('{"query": "q", "response": "two"}\n')
    seen = look_up_step(tmp_path, 1)
    assert seen.recorded is not None
    assert seen.recorded.examples != seen.hash
