"""What a BatchLoader promises: nothing lost, nothing doubled, the same for any threads and ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.errors import ConfigError


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 rows of very different lengths, each with its number in the question."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (
        json.dumps({"query": f"row {number}", "response": "word " * (1 + number * 7 % 50)})
        for number in range(97)
    )
    path.write_text("\n".join(lines))
    return path


def texts(loader: BatchLoader) -> list[list[str]]:
    """The question of each example of each batch."""
    batches = []
    for batch in loader:
        lengths = batch["attention_mask"].sum(axis=1)
        decoded = [
            loader.encoder.decode(ids[:length], skip_special_tokens=False)
            for ids, length in zip(batch["input_ids"], lengths, strict=True)
        ]
        batches.append(
            [text.split("user\n")[1].split("<")[0] for text in decoded if "user" in text]
        )
    return batches


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    mode=st.sampled_from(["bucket", "sequential"]),
)
def test_every_row_is_seen_once_an_epoch_over_all_ranks(
    encoder: Encoder, rows: Path, batch_size: int, accumulation: int, world_size: int, mode: str
) -> None:
    seen: list[str] = []
    steps = set()
    for rank in range(world_size):
        loader = BatchLoader(
            rows,
            encoder,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world_size,
            mode=mode,
            return_tensors="np",
        )
        batches = texts(loader)
        assert len(batches) == len(loader) == loader.steps_per_epoch * accumulation
        steps.add(len(batches))
        seen += [text for batch in batches for text in batch]
    assert len(steps) == 1
    assert sorted(seen) == sorted(f"row {number}" for number in range(97))


@pytest.mark.parametrize("kind", ["bucket", "pack", "sequential", "stream"])
def test_batches_do_not_depend_on_the_number_of_threads(
    shared_data: Path, rows: Path, kind: str
) -> None:
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=128)

    def batches(num_threads: int) -> list[bytes]:
        settings: dict = {"batch_size": 3, "num_threads": num_threads, "return_tensors": "np"}
        if kind == "stream":
            loader = StreamLoader(rows, encoder, shuffle_buffer_size=20, **settings)
        else:
            loader = BatchLoader(rows, encoder, mode=kind, cache=False, **settings)
        return [batch["input_ids"].tobytes() for _ in range(2) for batch in loader]

    assert batches(1) == batches(2) == batches(8)


def test_each_epoch_has_its_own_order_and_the_same_rows(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(rows, encoder, batch_size=4, return_tensors="np")
    first, second = texts(loader), texts(loader)
    assert first != second
    assert sorted(sum(first, [])) == sorted(sum(second, []))
    loader.set_epoch(0)
    assert texts(loader) == first


def test_the_plan_names_the_rows_of_each_step(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(
        rows, encoder, batch_size=2, gradient_accumulation_steps=2, return_tensors="np"
    )
    batches = texts(loader)
    for step, planned in enumerate(loader.plan(0)):
        handed_out = batches[2 * step] + batches[2 * step + 1]
        assert [f"row {loader.place(row)[1] - 1}" for row in planned] == handed_out


def test_buckets_pad_less_than_the_order_of_the_file(encoder: Encoder, rows: Path) -> None:
    def padding(mode: str) -> float:
        masks = [
            batch["attention_mask"]
            for batch in BatchLoader(rows, encoder, batch_size=8, mode=mode, return_tensors="np")
        ]
        return 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)

    assert padding("bucket") < 0.2 * padding("sequential")


@pytest.mark.parametrize("stop", [0, 1, 7, 24, 25, 31])
def test_a_loader_goes_on_where_its_state_was_taken(
    encoder: Encoder, rows: Path, stop: int
) -> None:
    def loader(**sharing: int) -> BatchLoader:
        return BatchLoader(rows, encoder, return_tensors="np", **sharing)

    whole = loader(batch_size=2, gradient_accumulation_steps=2)
    stream = texts(whole) + texts(whole)
    first = loader(batch_size=2, gradient_accumulation_steps=2)
    taken = 0
    while taken < 2 * stop:
        for _ in first:
            taken += 1
            if taken == 2 * stop:
                break
    state = json.loads(json.dumps(first.state_dict()))
    resumed = loader(batch_size=2, gradient_accumulation_steps=2)
    resumed.load_state_dict(state)
    rest = texts(resumed)
    assert rest == stream[2 * stop : 2 * stop + len(rest)]
    # on two ranks the same global batches go on
    ranks = [loader(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    shared = [sum(pair, []) for pair in zip(*(texts(rank) for rank in ranks), strict=True)]
    assert shared == [rest[at] + rest[at + 1] for at in range(0, len(rest), 2)]


def test_a_state_of_other_data_is_refused(encoder: Encoder, rows: Path, tmp_path: Path) -> None:
    state = BatchLoader(rows, encoder, return_tensors="np").state_dict()
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("row 5", "row five"))
    with pytest.raises(ConfigError, match="the loader state is of other data"):
        BatchLoader(other, encoder, return_tensors="np").load_state_dict(state)


def test_train_and_validation_are_complementary_and_stable(encoder: Encoder, rows: Path) -> None:
    train = BatchLoader(rows, encoder, split="train", split_ratio=0.1, return_tensors="np")
    held_out = train.sibling(split="validation", batch_size=4)
    assert 0 < held_out.num_rows < 20
    seen, held = sum(texts(train), []), sum(texts(held_out), [])
    assert sorted(seen + held) == sorted(f"row {number}" for number in range(97))
    again = BatchLoader(rows, encoder, split="validation", split_ratio=0.1, return_tensors="np")
    assert sorted(sum(texts(again), [])) == sorted(held)


def test_a_number_after_the_path_draws_that_many_rows(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(f"{rows}#20", encoder, return_tensors="np")
    seen = sum(texts(loader), [])
    assert len(set(seen)) == loader.num_rows == 20
    assert loader.report["not_drawn"] == 77
    with pytest.raises(ConfigError, match="#98 asks for more rows than the 97 there are"):
        BatchLoader(f"{rows}#98", encoder)


def test_arrays_move_into_numpy_without_a_copy(encoder: Encoder, rows: Path) -> None:
    batch = next(iter(BatchLoader(rows, encoder, batch_size=4, return_tensors="np")))
    for array in batch.values():
        assert array.dtype == np.int64
        assert array.flags["C_CONTIGUOUS"]
        # the memory belongs to a Rust vector, not to numpy
        base = array if array.base is None else array.base
        assert not base.flags["OWNDATA"]


def test_labels_differ_from_input_ids_only_off_the_mask(encoder: Encoder, rows: Path) -> None:
    for batch in BatchLoader(rows, encoder, batch_size=8, return_tensors="np"):
        trained = batch["labels"] != -100
        assert trained.any(axis=1).all()
        assert (batch["labels"][trained] == batch["input_ids"][trained]).all()
        assert batch["attention_mask"][trained].all()


def test_tensors_share_memory_with_the_core(encoder: Encoder, rows: Path) -> None:
    torch = pytest.importorskip("torch")
    batch = next(iter(BatchLoader(rows, encoder, batch_size=4)))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"batch_size": 0}, "batch_size 0 is out of range: expected 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank 2 is out of range: expected 0 to 1"),
        ({"split_ratio": 1.0}, "split_ratio 1.0 is out of range: expected 0 <= ratio < 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(
    encoder: Encoder, rows: Path, setting: dict, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        BatchLoader(rows, encoder, **setting)
    assert str(caught.value) == text


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_hanging(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(rows, encoder, return_tensors="np")
    iterator = iter(loader)
    next(iterator)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            next(iterator)
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"forked process" in os.read(read, 1000)
