"""What each switch brings by itself: the same run, with one setting that differs from the first."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu.cases import Cases, Skip
from gpu.measure import forget, run_ours, wait
from gpu.shapes import make_rows, make_shape, on_gpu
from gpu.speed import SHORT
from sftcore.errors import ConfigError

_NEEDS_GPU = "needs a GPU"
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# LoRA, padded, with all else as it is by default
_SWITCHES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "checkpointing selective": {"gradient_checkpointing_kind": "selective"},
    "loss plain": {"loss_impl": "plain"},
    "torch_compile": {"torch_compile": True},
    "checkpointing offload": {"gradient_checkpointing_kind": "offload"},
    "activation_offload": {"activation_offload": True, "gradient_checkpointing": False},
    "liger": {"use_liger_kernel": True},
    "attention eager": {"attn_impl": "eager"},
    "attention flash_attention_2, padding-free": {
        "attn_impl": "flash_attention_2",
        "padding_free": True,
    },
    "attention flash_attention_3, padding-free": {
        "attn_impl": "flash_attention_3",
        "padding_free": True,
    },
    "attention sdpa, padding-free": {"attn_impl": "sdpa", "padding_free": True},
    "attention flex_attention, padding-free": {"attn_impl": "flex_attention", "padding_free": True},
    "attention flex_attention": {"attn_impl": "flex_attention"},
}
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# each builds kernels, for minutes on a CPU
_COMPILED = ("torch_compile", "attention flex_attention", "attention flex_attention, padding-free")
_PACKAGES = {
    "liger": "liger_kernel",
    "attention flash_attention_2, padding-free": "flash_attn",
    "attention flash_attention_3, padding-free": "flash_attn_interface",
}


def switches(pack: Path, work: Path) -> int:
    """Runs the defaults, and each switch."""
    shape = make_shape("1B", pack, work)
    rows = make_rows(pack, work / "switches.jsonl", max_length=SHORT, count=200)
    kernels = {f"attention sdpa, {name} kernel": backend for name, backend in _SDPA.items()}
    layers = {f"attention alone, {name}": call for name, call in _LAYERS.items()}
    optimizers = {f"full, optim {name}": name for name in _OPTIMIZERS}
    plain = [name for name in _SWITCHES if name not in _COMPILED]
    names = [*plain, *optimizers, *layers, *kernels, *_COMPILED]
    cases = Cases(work / "switches.json", names)

    def measured(
        within: AbstractContextManager[Any] | None = None, **more: Any
    ) -> Callable[[], dict[str, Any]]:
        return partial(_measured, shape, rows, work / "switches", within or nullcontext(), more)

    for name in plain:
        package = _PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            cases.note(name, "skipped", reason=f"{package} is not on this machine")
        else:
            cases.run(name, measured(**_SWITCHES[name]))
    for name, optim in optimizers.items():
        cases.run(name, measured(tuner_type="full", optim=optim))
    for name, call in layers.items():
        cases.run(name, partial(_attention_alone, call))
    for name, backend in kernels.items():
        if on_gpu():
            cases.run(name, measured(sdpa_kernel(backend), attn_impl="sdpa"))
        else:
            cases.note(name, "skipped", reason=_NEEDS_GPU)
    # the last, as what builds kernels may take all the time
    for name in _COMPILED:
        if on_gpu():
            cases.run(name, measured(**_SWITCHES[name]))
        else:
            cases.note(name, "skipped", reason=_NEEDS_GPU)
    return cases.exit_code()


def _measured(
    shape: Path, rows: Path, work: Path, within: AbstractContextManager[Any], more: dict[str, Any]
) -> dict[str, Any]:
    try:
        with within:
            return run_ours(shape, rows, work, max_length=SHORT, **more)
    except ConfigError as error:
        if "without a GPU" in str(error):
            raise Skip(_NEEDS_GPU) from error
        raise
    except RuntimeError as error:
        # one kernel alone was allowed, and it does not take a mask, or not this machine
        if "No available kernel" in str(error):
            raise Skip(f"this kernel does not run the layer: {str(error)[:200]}") from error
        raise


# one layer of attention of the 1B shape on packed examples, forward and backward


def _packed_mask(borders: list[int]) -> torch.Tensor:
    """Returns what each token may see, bool `[1, 1, tokens, tokens]`: those before it in its example."""
    number = torch.repeat_interleave(
        torch.arange(len(borders) - 1), torch.tensor(borders).diff()
    ).to(_device())
    return (number[:, None] == number[None, :]).tril()[None, None]


def _device() -> str:
    return "cuda" if on_gpu() else "cpu"


def _sdpa_masked(q: Any, k: Any, v: Any, *, mask: Any, **_: Any) -> Any:
    # as Transformers does, since no fast kernel takes both a mask and fewer heads of keys
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _sdpa_causal(q: Any, k: Any, v: Any, **_: Any) -> Any:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _varlen(q: Any, k: Any, v: Any, *, borders: list[int], **_: Any) -> Any:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise Skip("this torch has no torch.nn.attention.varlen")
    if not on_gpu():
        raise Skip(_NEEDS_GPU)
    from torch.nn.attention.varlen import varlen_attn

    taken = inspect.signature(varlen_attn).parameters
    # how it is told that a token sees none after it differs among versions of torch
    causal = {"is_causal": True} if "is_causal" in taken else {"window_size": (-1, 0)}
    ends = torch.tensor(borders, dtype=torch.int32, device=_device())
    longest = max(stop - start for start, stop in pairwise(borders))
    # as many heads of keys as of queries, which all versions take
    groups = q.shape[1] // k.shape[1]
    flat = [x[0].transpose(0, 1) for x in (q, *(x.repeat_interleave(groups, 1) for x in (k, v)))]
    return varlen_attn(*flat, ends, ends, longest, longest, **causal)


_LAYERS: dict[str, Callable[..., Any]] = {
    "sdpa with a mask of the examples": _sdpa_masked,
    "varlen_attn": _varlen,
    "sdpa as if all were one example": _sdpa_causal,
}


def _attention_alone(call: Callable[..., Any]) -> dict[str, Any]:
    forget()
    length, heads, kv_heads, size = (8192, 32, 8, 64) if on_gpu() else (256, 4, 2, 8)
    borders = [length * part // 8 for part in (0, 1, 2, 4, 5, 8)]
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, count, length, size, dtype=dtype, device=_device(), requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    mask = _packed_mask(borders)
    repeats = 10 if on_gpu() else 1
    begun = time.perf_counter()
    for turn in range(repeats + 3):
        if turn == 3:
            wait()
            begun = time.perf_counter()
        call(q, k, v, borders=borders, mask=mask).sum().backward()
    wait()
    return {
        "tokens": length,
        "examples": len(borders) - 1,
        "milliseconds": (time.perf_counter() - begun) * 1e3 / repeats,
    }
