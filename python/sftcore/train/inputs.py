"""From a batch of the loader to what a model takes, and back from tokens to examples.

Examples that share a row are kept apart by positions that restart and, for flash kernels, by their borders; no
attention mask is given then, as with one Transformers takes a row for a single sequence. Rows that are padded on the
right need no mask either where attention is causal: no token looks at what comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sftcore.train.head import shift


@dataclass(frozen=True, kw_only=True, slots=True)
class InputKind:
    """How a model wants its batches.

    Attributes:
        needs_mask: Whether padded rows need their attention mask.
        is_flash: Whether attention takes the borders of examples.
    """

    needs_mask: bool = True
    is_flash: bool = False


def model_inputs(batch: dict[str, Any], kind: InputKind) -> dict[str, Any]:
    """Returns the arguments of the model's forward pass, `labels` and `loss_weights` among them.

    Args:
        batch: A batch of the loader, on the device of the model.
        kind: How the model wants it.
    """
    borders = batch.get("cu_seqlens")
    inputs = {name: batch[name] for name in ("input_ids", "labels")}
    if batch.get("loss_weights") is not None:
        inputs["loss_weights"] = batch["loss_weights"]
    if borders is None:
        if kind.needs_mask:
            inputs["attention_mask"] = batch["attention_mask"]
        return inputs
    inputs["position_ids"] = batch["position_ids"]
    if kind.is_flash:
        # these kernels take one row; its borders are those of the flattened batch
        inputs = {name: value.reshape(1, -1) for name, value in inputs.items()}
        longest = int((borders[1:] - borders[:-1]).max())
        borders = borders.to(torch.int32)
        inputs |= {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return inputs


def examples_of_tokens(batch: dict[str, Any]) -> Tensor:
    """Returns which example of the batch each trained token belongs to, int64 `[trained tokens]`.

    Args:
        batch: A batch of the loader; its examples count from 0 in the order of `rows`.
    """
    labels = batch["labels"]
    trained = shift(labels, -100) != -100
    borders = batch.get("cu_seqlens")
    if borders is None:
        return trained.nonzero()[:, 0]
    # the token that predicts a label lies in the example of the label
    places = trained.reshape(-1).nonzero()[:, 0]
    parts = torch.searchsorted(borders.to(torch.int64), places, right=True) - 1
    surplus = len(borders) - 1 - len(batch["rows"])
    return _without_padding(batch, surplus)[parts] if surplus else parts


def _without_padding(batch: dict[str, Any], surplus: int) -> Tensor:
    """Returns the number of the example of each part of the borders, `surplus` of which are the padding of rows."""
    borders, labels = batch["cu_seqlens"].tolist(), batch["labels"]
    width, flat = labels.shape[1], labels.reshape(-1)
    numbers, number = [], 0
    for start, end in pairwise(borders):
        numbers.append(number)
        is_padding = surplus > 0 and end % width == 0 and bool((flat[start:end] == -100).all())
        surplus -= is_padding
        number += not is_padding
    return torch.tensor(numbers, device=labels.device)
