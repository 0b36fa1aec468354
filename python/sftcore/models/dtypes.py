"""In which dtype weights lie, and in which the model computes.

An update of AdamW at a usual learning rate is far below the 8 bits of a bfloat16 mantissa: weights that are trained
are float32, and only what is frozen is kept in half precision. On a GPU the model computes in bfloat16 either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Dtypes:
    """The dtypes of a run.

    Attributes:
        weights: Of the weights of the model.
        compute: Of matrix products; where it is not that of the weights, they are cast on the way (autocast).
        warning: What a user should know of this choice.
    """

    weights: torch.dtype
    compute: torch.dtype
    warning: str | None = None


def choose_dtypes(name: str, *, trains_weights: bool) -> Dtypes:
    """Returns the dtypes of a training run.

    Args:
        name: `auto`, `float32`, `bfloat16` or `float16`.
        trains_weights: Whether weights of the model itself are trained, not an adapter beside them.
    """
    on_gpu = torch.cuda.is_available()
    if name == "auto":
        half = on_gpu and torch.cuda.is_bf16_supported()
        compute = torch.bfloat16 if half else torch.float32
        return Dtypes(weights=torch.float32 if trains_weights else compute, compute=compute)
    dtype: torch.dtype = getattr(torch, name)
    if not trains_weights or dtype == torch.float32:
        return Dtypes(weights=dtype, compute=dtype)
    if dtype == torch.float16 and on_gpu:
        # its gradients are scaled, which needs float32 weights
        return Dtypes(weights=torch.float32, compute=dtype)
    return Dtypes(
        weights=dtype,
        compute=dtype,
        warning=f"weights are trained in {name}: updates below 1/256 of a weight are rounded away; --torch_dtype auto "
        "keeps them in float32",
    )
