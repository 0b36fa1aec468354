"""Whether a model keeps examples apart that share a row, found out on the very model before training.

Some models do not, and say nothing: linear attention and state spaces carry their state over the border, and some
kernels build their mask from something else than positions. Two things are tried on short examples of
random tokens: another first example must not change the logits of the second, and each must have
the logits that it has alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sftcore.models.shapes import full_shape
from sftcore.train.inputs import InputKind, model_inputs

_LENGTHS = (17, 9, 23)


def why_not_packed(model: Any, kind: InputKind) -> str | None:
    """Returns what goes wrong when examples share a row; None where all is right.

    Args:
        model: A causal language model, on its device.
        kind: How it takes batches.
    """
    return compare_packed(model, kind)[0]


def compare_packed(model: Any, kind: InputKind) -> tuple[str | None, float | None]:
    """Returns what goes wrong when examples share a row, as `why_not_packed`, and the measure of it.

    The measure is the largest difference of a logit from that of separate rows, over the deviation of all logits; none
    where the model refuses such rows.
    """
    examples, other = _examples(model), _examples(model, seed=1)
    with _evaluating(model):
        try:
            together = _packed(model, examples, kind)
            changed = _packed(model, [other[0], *examples[1:]], kind)
            alone = [_logits(model, {"input_ids": ids[None]})[0] for ids in examples]
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            return f"the model refuses them ({type(error).__name__}: {error})", None
    first = _LENGTHS[0]
    scale = float(together.std())
    leak = float((together[first:] - changed[first:]).abs().max()) / scale
    distance = float((together - torch.cat(alone)).abs().max()) / scale
    # kernels sum in another order for other values, but the tokens of one example never reach another
    exact = together.dtype == torch.float32 and next(model.parameters()).dtype == torch.float32
    if leak > (1e-4 if exact else 1e-2):
        return f"an example changes the logits of the next by {leak:.2g} of their deviation", leak
    if distance > (1e-3 if exact else 0.25):
        reason = f"logits differ from those of separate rows by {distance:.2g} of their deviation"
        return reason, distance
    return None, max(leak, distance)


def needs_mask(model: Any) -> bool:
    """Returns whether padding on the right must be masked for the logits of the tokens before it to be right."""
    short, _, long = _examples(model)
    padded = torch.cat([short, short.new_full((len(long) - len(short),), int(short[0]))])
    ids = torch.stack([padded, long])
    mask = torch.ones_like(ids)
    mask[0, len(short) :] = 0
    with _evaluating(model):
        try:
            with_mask = _logits(model, {"input_ids": ids, "attention_mask": mask})
            without = _logits(model, {"input_ids": ids})
        except (ValueError, RuntimeError, NotImplementedError, TypeError):
            return True
    is_token = mask.bool()
    scale = float(with_mask[is_token].std())
    distance = float((with_mask[is_token] - without[is_token]).abs().max()) / scale
    exact = next(model.parameters()).dtype == torch.float32
    return distance > (1e-4 if exact else 5e-2)


def _examples(model: Any, seed: int = 0) -> list[Tensor]:
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, full_shape(embeddings)[0], (length,), generator=generator).to(
            embeddings.device
        )
        for length in _LENGTHS
    ]


def _packed(model: Any, examples: list[Tensor], kind: InputKind) -> Tensor:
    ids = torch.cat(examples)[None]
    positions = torch.cat([torch.arange(len(ids), device=ids.device) for ids in examples])[None]
    ends = torch.tensor([0, *(len(ids) for ids in examples)], device=ids.device).cumsum(0)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "cu_seqlens": ends}
    inputs = model_inputs(batch, kind)
    del inputs["labels"]
    return _logits(model, inputs)[0]


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits.float()
    return logits


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout; the mode of the model is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
