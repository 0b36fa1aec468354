"""Packed and padding-free batches: nothing lost, nothing cut, nothing trained across examples."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError

LENGTH = 128


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=LENGTH)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (
        json.dumps({"query": f"row {number}", "response": "word " * (1 + number * 7 % 60)})
        for number in range(150)
    )
    path.write_text("\n".join(lines))
    return path


def examples(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each example of a batch, without padding."""
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(axis=1)
        return [
            (ids[:length].tolist(), labels[:length].tolist())
            for ids, labels, length in zip(
                batch["input_ids"], batch["labels"], lengths, strict=True
            )
        ]
    ids, labels = batch["input_ids"].ravel(), batch["labels"].ravel()
    borders = batch["cu_seqlens"]
    found = [
        (ids[start:end].tolist(), labels[start:end].tolist())
        for start, end in itertools.pairwise(borders)
    ]
    return [example for example in found if any(label != -100 for label in example[1])]


def all_examples(loader: BatchLoader) -> list[tuple[list[int], list[int]]]:
    return sorted(example for batch in loader for example in examples(batch))


@settings(max_examples=20, deadline=None)
@given(
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    shape=st.sampled_from(
        [
            {"mode": "pack"},
            {"mode": "pack", "padding_free": True},
            {"mode": "pack", "pack_length": 500},
            {"mode": "bucket", "padding_free": True},
            {"mode": "bucket", "tokens_per_batch": 300},
            {"mode": "sequential", "tokens_per_batch": 300},
        ]
    ),
)
def test_every_example_comes_once_an_epoch_over_all_ranks(
    encoder: Encoder,
    rows: Path,
    batch_size: int,
    accumulation: int,
    world_size: int,
    shape: dict[str, Any],
) -> None:
    if "tokens_per_batch" in shape:
        batch_size = 1
    whole = all_examples(BatchLoader(rows, encoder, return_tensors="np"))
    seen: list[tuple[list[int], list[int]]] = []
    steps = set()
    for rank in range(world_size):
        loader = BatchLoader(
            rows,
            encoder,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world_size,
            return_tensors="np",
            **shape,
        )
        batches = list(loader)
        steps.add(len(batches))
        assert len(batches) == loader.steps_per_epoch * accumulation
        seen += [example for batch in batches for example in examples(batch)]
    assert len(steps) == 1
    assert sorted(seen) == whole


def test_packs_keep_positions_and_labels_of_each_example_apart(
    encoder: Encoder, rows: Path
) -> None:
    for batch in BatchLoader(rows, encoder, mode="pack", batch_size=3, return_tensors="np"):
        assert "attention_mask" not in batch
        assert batch["input_ids"].shape[1] <= LENGTH
        positions, labels = batch["position_ids"].ravel(), batch["labels"].ravel()
        borders = batch["cu_seqlens"]
        assert borders.dtype == np.int32
        assert borders[0] == 0
        assert borders[-1] == positions.size
        for start, end in itertools.pairwise(borders):
            assert (positions[start:end] == np.arange(end - start)).all()
            assert labels[start] == -100


def test_a_padding_free_batch_has_no_padding(encoder: Encoder, rows: Path) -> None:
    padded = BatchLoader(rows, encoder, batch_size=4, return_tensors="np")
    flat = BatchLoader(rows, encoder, batch_size=4, padding_free=True, return_tensors="np")
    for one, other in zip(padded, flat, strict=True):
        assert other["input_ids"].shape == (1, one["attention_mask"].sum())


def test_packing_fills_nearly_all_places(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(rows, encoder, mode="pack", pack_length=512, return_tensors="np")
    tokens = loader.report["split_tokens"]
    # one pack more than could hold all tokens without a gap
    assert len(loader) <= -(-tokens // 512) + 1
    assert len(loader) < loader.num_rows / 2


def test_a_pack_is_made_anew_each_epoch(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(rows, encoder, mode="pack", return_tensors="np")
    packs = [
        {tuple(sorted(pack)) for step in loader.plan(epoch) for pack in [step]} for epoch in (0, 1)
    ]
    assert len(packs[0] & packs[1]) < len(packs[0]) / 2


def test_micro_batches_by_tokens_hold_no_more(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(rows, encoder, tokens_per_batch=256, return_tensors="np")
    shapes = [batch["input_ids"].shape for batch in loader]
    assert all(rows * width <= 256 for rows, width in shapes)
    assert len({rows for rows, _ in shapes}) > 2


def test_rows_are_named_where_asked(encoder: Encoder, rows: Path) -> None:
    loader = BatchLoader(rows, encoder, mode="pack", return_rows=True, return_tensors="np")
    for planned, batch in zip(loader.plan(0), loader, strict=True):
        assert batch["rows"].tolist() == planned


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"mode": "pack", "tokens_per_batch": 9}, "tokens_per_batch has no effect on packs"),
        ({"pack_length": 99}, "pack_length has no effect without mode"),
        ({"mode": "pack", "pack_length": 20}, "pack_length 20 is out of range: the longest"),
        ({"batch_size": 2, "tokens_per_batch": 9}, "exclude each other"),
        ({"mode": "bin"}, 'mode "bin" is unknown; expected bucket, pack or sequential'),
        ({"mix_by": "tokens"}, "have no effect without mix"),
        ({"max_bad_rows": 1}, "max_bad_rows has no effect with on_bad_row raise"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    encoder: Encoder, rows: Path, setting: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        BatchLoader(rows, encoder, **setting)
    assert text in str(caught.value)


def test_a_row_that_is_too_long_becomes_several_examples(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "smollm2"
    whole = Encoder.from_pretrained(folder)
    encoder = Encoder.from_pretrained(folder, max_length=40, truncation_strategy="split")
    path = tmp_path / "rows.jsonl"
    long = {"query": "word " * 90, "response": "answer " * 90}
    path.write_text(json.dumps({"query": "q", "response": "a"}) + "\n" + json.dumps(long))
    loader = BatchLoader(path, encoder, mode="sequential", return_tensors="np")
    report = loader.report
    pieces = [example for batch in loader for example in examples(batch)][1:]
    expected = whole.encode(long)
    assert (report["rows"], report["split"], report["first_split"]) == (2, 1, f"{path}:2")
    assert report["examples"] == 1 + len(pieces)
    # the first pieces hold the question alone, and are left out and counted
    assert report["untrained_pieces"] == -(-len(expected) // 40) - len(pieces) > 0
    joined = [token for ids, _ in pieces for token in ids]
    assert joined == expected.input_ids.tolist()[-len(joined) :]
    assert sum(label != -100 for _, labels in pieces for label in labels) == int(
        expected.loss_mask.sum()
    )
