"""Batches as a loader hands them out: their names, their kind of array, and the numbers that share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sftcore.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mode = Literal["bucket", "pack", "sequential"]
_NAMES = ("input_ids", "labels", "attention_mask", "position_ids", "loss_weights", "cu_seqlens")


def check_sharing(
    batch_size: int, tokens_per_batch: int | None, accumulation: int, rank: int, world_size: int
) -> None:
    """Raises a ConfigError where the numbers that share a global batch are out of range."""
    for name, value in (
        ("batch_size", batch_size),
        ("tokens_per_batch", tokens_per_batch),
        ("gradient_accumulation_steps", accumulation),
        ("world_size", world_size),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is out of range: expected 1 or more")
    if tokens_per_batch is not None and batch_size != 1:
        raise ConfigError("batch_size and tokens_per_batch exclude each other")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is out of range: expected 0 to {world_size - 1}")


def named(
    arrays: Sequence[NDArray[Any] | None],
    rows: NDArray[Any] | None,
    convert: Callable[[NDArray[Any]], Any],
) -> dict[str, Any]:
    """Returns the arrays of a batch that there are, by their names."""
    batch = {
        name: convert(array)
        for name, array in zip(_NAMES, arrays, strict=True)
        if array is not None
    }
    if rows is not None:
        batch["rows"] = convert(rows)
    return batch


def converter(return_tensors: str) -> Callable[[NDArray[Any]], Any]:
    """Returns what makes an array what the caller asked for: `np` or `pt`."""
    if return_tensors == "np":
        return lambda array: array
    if return_tensors != "pt":
        raise ConfigError(f'return_tensors "{return_tensors}" is unknown; expected pt or np')
    from torch import from_numpy  # only here: the data side runs without torch installed

    return from_numpy
