"""Which attention kernel a model runs with, and why.

`auto` takes the fastest kernel that is installed and fits the device, the dtype and the head size: Flash Attention 3 on
Hopper, Flash Attention 2 from Ampere on, else PyTorch's own (sdpa). A kernel asked for by name that cannot run is an
error that says what is in the way, before any weight is loaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """A chosen kernel.

    Attributes:
        name: Its name in Transformers.
        reason: Why this one, in a few words.
    """

    name: str
    reason: str

    @property
    def is_flash(self) -> bool:
        """Whether it takes the borders of examples and never builds a mask."""
        return "flash" in self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a kernel needs to know of the machine.

    Attributes:
        kind: `cuda` or `cpu`.
        capability: The compute capability of a CUDA device, like (8, 0); (0, 0) elsewhere.
        packages: The kernels that are installed, by the names of their modules.
    """

    kind: str
    capability: tuple[int, int]
    packages: frozenset[str]


_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


def this_device() -> Device:
    """Returns what the machine has."""
    packages = frozenset(
        module
        for module, _ in (*_PACKAGES.values(), ("kernels", ""))
        if importlib.util.find_spec(module) is not None
    )
    if torch.cuda.is_available():
        return Device(kind="cuda", capability=torch.cuda.get_device_capability(), packages=packages)
    return Device(kind="cpu", capability=(0, 0), packages=packages)


def choose_attention(
    name: str, config: Any, dtype: torch.dtype, *, training: bool, device: Device | None = None
) -> Attention:
    """Returns the kernel that a model runs with.

    Args:
        name: `auto`, or a name of Transformers (`sdpa`, `flash_attention_2`, `kernels-community/…`).
        config: The configuration of the model.
        dtype: The dtype that attention computes in.
        training: Whether gradients are needed.
        device: The machine; this one where not given.

    Raises:
        ConfigError: The kernel is unknown, or cannot run here.
    """
    machine = device or this_device()
    known = ("auto", "eager", *_PACKAGES, *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if "/" not in name and name not in known:
        raise ConfigError(
            f"--attn_impl {name} is unknown; expected auto, sdpa, eager, flex_attention, flash_attention_2, "
            f"flash_attention_3 or a kernel of the hub{did_you_mean(name, known)}"
        )
    if name == "auto":
        return _best(config, dtype, machine)
    if name in _PACKAGES:
        obstacle = _obstacle(name, config, dtype, machine)
        if obstacle:
            raise ConfigError(
                f"--attn_impl {name} cannot run: {obstacle}; --attn_impl auto takes what can"
            )
    elif name == "sdpa" and not _supports(config, "sdpa"):
        raise ConfigError(
            f"--attn_impl sdpa cannot run: {config.model_type} has no code for it; --attn_impl auto takes what can"
        )
    elif name == "flex_attention" and training and machine.kind == "cpu":
        raise ConfigError(
            "--attn_impl flex_attention has no backward pass on a CPU; take sdpa or eager"
        )
    elif "/" in name and "kernels" not in machine.packages:
        raise ConfigError(
            f"--attn_impl {name} is a kernel of the hub; run pip install kernels, or take sdpa"
        )
    return Attention(name=name, reason="as asked for")


def _best(config: Any, dtype: torch.dtype, machine: Device) -> Attention:
    obstacles = []
    for kernel in ("flash_attention_3", "flash_attention_2"):
        obstacle = _obstacle(kernel, config, dtype, machine)
        if obstacle is None:
            return Attention(name=kernel, reason="installed, and fits device, dtype and head size")
        obstacles.append(f"{kernel}: {obstacle}")
    if not _supports(config, "sdpa"):
        obstacles.append(f"sdpa: {config.model_type} has no code for it")
        return Attention(name="eager", reason="; ".join(obstacles))
    return Attention(name="sdpa", reason="; ".join(obstacles))


def _supports(config: Any, kernel: str) -> bool:
    """Returns whether the model of a configuration has code for a kernel: `sdpa` or `flash_attn`."""
    # the mapping loads the code of this one model
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(found, f"_supports_{kernel}", True))


def _obstacle(kernel: str, config: Any, dtype: torch.dtype, machine: Device) -> str | None:
    """Returns what keeps a flash kernel from running, None where nothing does."""
    module, package = _PACKAGES[kernel]
    if machine.kind != "cuda":
        return "it needs a CUDA device"
    least = (9, 0) if kernel == "flash_attention_3" else (8, 0)
    if machine.capability < least:
        found = ".".join(map(str, machine.capability))
        return f"it needs compute capability {least[0]}.{least[1]}, found {found}"
    if kernel == "flash_attention_3" and machine.capability[0] != 9:
        return "it is made for Hopper devices"
    if module not in machine.packages:
        return f"the package {package} is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if not _supports(config, "flash_attn"):
        return f"{config.model_type} has no code for it"
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    if size is not None and size > 256:
        return f"its heads have up to 256 dimensions, those of this model {size}"
    return None
