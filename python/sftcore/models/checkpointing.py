"""Activations that are not kept: computed again in the backward pass, or moved to the memory of the host."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sftcore.errors import ConfigError

_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.linear.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
_LEAST_BYTES = 1 << 20


def checkpointing_arguments(kind: str) -> dict[str, Any]:
    """Returns the arguments of `torch.utils.checkpoint` for a kind: `full`, `selective` or `offload`."""
    if kind == "selective":
        return {"use_reentrant": False, "context_fn": _KeepProducts("keep matrix products")}
    # what the reentrant kind saves goes through hooks, so that it can be offloaded
    return {"use_reentrant": kind == "offload"}


def require_gpu(config: Any) -> None:
    """Raises a ConfigError where a setting moves or fuses what only a GPU has, or what its package is not there for.

    Args:
        config: The settings of a run.
    """
    if torch.cuda.is_available():
        if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
            raise ConfigError(
                "--use_liger_kernel true needs the package liger-kernel, which is not installed; run pip install "
                "liger-kernel"
            )
        return
    asked = {
        "gradient_checkpointing_kind offload": config.gradient_checkpointing_kind == "offload",
        "activation_offload true": config.activation_offload,
        "tf32 true": bool(config.tf32),
        "use_liger_kernel true": config.use_liger_kernel,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ConfigError(f"--{name} has no effect without a GPU; leave it out")


class _KeepProducts(str):
    """The contexts of selective checkpointing; a string too, as loggers write the arguments of a run as JSON."""

    __slots__ = ()

    def __call__(self) -> Any:
        return create_selective_checkpoint_contexts(_keep_products)  # type: ignore[no-untyped-call, unused-ignore]


def _keep_products(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
    )


def activations_of(config: Any, parameters: Callable[[], Any]) -> AbstractContextManager[Any]:
    """Returns the context that the forward pass of a run goes in.

    Args:
        config: The settings of the run.
        parameters: Gives the parameters of the model.
    """
    if config.activation_offload or config.gradient_checkpointing_kind == "offload":
        return offload_activations(parameters)
    return nullcontext()


def offload_activations(
    parameters: Callable[[], Any], *, least_bytes: int = _LEAST_BYTES
) -> AbstractContextManager[Any]:
    """Returns a context in which tensors that are saved for the backward pass lie in the memory of the host.

    Weights stay where they are, as do tensors below `least_bytes`, whose transfer would cost more than it frees.

    Args:
        parameters: Gives the parameters of the model.
        least_bytes: The smallest tensor that is moved.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        is_small = tensor.numel() * tensor.element_size() < least_bytes
        if is_small or tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        if tensor.device.type != "cuda":
            return tensor.device, tensor.to("cpu", copy=True)
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        kept.copy_(tensor, non_blocking=True)
        return tensor.device, kept

    def unpack(saved: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = saved
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
