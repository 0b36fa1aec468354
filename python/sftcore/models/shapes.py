"""The shape of a parameter, also where this process holds but a part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of a whole parameter.

    One that DeepSpeed spread over ranks is empty between the calls that need it, and says its shape apart.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: Tensor) -> int:
    """Returns the number of elements of a whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
