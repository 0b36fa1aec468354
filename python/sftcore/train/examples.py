"""A batch taken apart into its examples, whichever way they lie in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sftcore.train.inputs import examples_of_tokens
from sftcore.train.loss import TokenLosses


def single_examples(batch: dict[str, Any]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields each example as its row number and a batch of its own, without padding.

    Args:
        batch: A batch of a loader with `rows`: padded, packed or free of padding.
    """
    names: list[str] = [name for name in ("input_ids", "labels", "loss_weights") if name in batch]
    width = batch["input_ids"].shape[1]
    borders = batch.get("cu_seqlens")
    if borders is None:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        parts = [(row * width, row * width + length) for row, length in enumerate(lengths)]
    else:
        parts = list(pairwise(borders.tolist()))
    surplus = len(parts) - len(batch["rows"]) if borders is not None else 0
    rows = iter(batch["rows"].tolist())
    for start, end in parts:
        values = {name: batch[name].reshape(-1)[None, start:end] for name in names}
        if surplus and end % width == 0 and _is_padding(values):
            surplus -= 1
            continue
        row = next(rows, None)
        if row is None:
            return  # a rank with nothing to do has a batch without rows
        mask = torch.ones_like(values["input_ids"])
        yield row, {**values, "attention_mask": mask, "rows": batch["rows"].new_tensor([row])}


def _is_padding(values: dict[str, Tensor]) -> bool:
    ids = values["input_ids"]
    return bool((values["labels"] == -100).all() and (ids == ids[0, 0]).all())


def sums_by_example(batch: dict[str, Any], losses: TokenLosses) -> Tensor:
    """Returns loss, right tokens and trained tokens of each example, float64 `[examples, 3]`.

    Args:
        batch: A batch of a loader with `rows`; the result is in their order.
        losses: Of its trained tokens.
    """
    values = torch.stack(
        [losses.losses, losses.right.float(), torch.ones_like(losses.losses)], dim=1
    ).double()
    sums = values.new_zeros(len(batch["rows"]), 3)
    return sums.index_add_(0, examples_of_tokens(batch), values)
