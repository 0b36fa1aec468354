"""What of a model is trained, weight by weight: by itself, or by an adapter on it.

A model with a tuner is walked as the model it was, so that names are those of its own modules whatever PEFT put around
them. From this come the table of what is trained and the share of the weights that an adapter reaches.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from sftcore.models.shapes import full_shape, full_size
from sftcore.tuners.experts import adapted_parameter, fused_experts, routers

_SHARED = re.compile(r"\.shared\w*(expert|mlp)", re.IGNORECASE)
_EXPERTS = re.compile(r"\.experts\b")
_MOST_NAMES = 6


@dataclass(kw_only=True, slots=True)
class Weight:
    """A parameter of a model and what is trained of it.

    Attributes:
        module: The name of the module it belongs to, as it was without a tuner.
        name: Its name there.
        shape: That of the whole parameter.
        size: Its elements.
        trained: The elements that are trained on its behalf: its own, or those of an adapter.
    """

    module: str
    name: str
    shape: tuple[int, ...]
    size: int
    trained: int = 0

    @property
    def path(self) -> str:
        """The whole name."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def kind(self) -> str:
        """The last part of its module that is no number, and its own name where that is no usual one."""
        parts = [part for part in self.module.split(".") if part and not part.isdigit()]
        usual = self.name in ("weight", "bias") and parts
        return parts[-1] if usual else ".".join([*parts[-1:], self.name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How much of the weight matrices of a model, embeddings and head apart, is trained or has an adapter.

    Attributes:
        share: That share of their elements.
        left_out: The share of each kind that is not, the largest first.
    """

    share: float
    left_out: dict[str, float]

    def __str__(self) -> str:
        text = f"{self.share:.1%} of the weight matrices"
        if not self.left_out:
            return text
        named = [f"{kind} {share:.2%}" for kind, share in self.left_out.items()][:_MOST_NAMES]
        more = len(self.left_out) - len(named)
        return f"{text}; without: {', '.join(named)}" + (f" and {more} more kinds" if more else "")


def size_of(parameter: nn.Parameter) -> int:
    """Returns the number of weights, of which 4-bit ones lie two in a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return int(full_size(parameter) if quantized is None else quantized.shape.numel())


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Returns the shape of the whole parameter, also where it is held in 4 bits or in parts."""
    quantized = getattr(parameter, "quant_state", None)
    return tuple(full_shape(parameter) if quantized is None else quantized.shape)


def weights_of(model: Any) -> list[Weight]:
    """Returns the parameters of a model, with what is trained of each.

    Args:
        model: A model with or without a tuner.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: list[Weight] = []
    seen: set[int] = set()
    for name, module, around in _walk("", base):
        own: dict[str, Weight] = {}
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue  # the head, where it shares the weight of the embedding
            seen.add(id(parameter))
            trained = size_of(parameter) if parameter.requires_grad else 0
            own[key] = Weight(
                module=name,
                name=key,
                shape=shape_of(parameter),
                size=size_of(parameter),
                trained=trained,
            )
        found += own.values()
        for wrapper in around:
            inner = "base_layer." if isinstance(wrapper, BaseTunerLayer) else "original_module."
            added = [
                parameter
                for key, parameter in wrapper.named_parameters()
                if not key.startswith(inner) and id(parameter) not in seen
            ]
            seen.update(id(parameter) for parameter in added)
            number = sum(size_of(p) for p in added if p.requires_grad)
            target = adapted_parameter(wrapper) or "weight"
            if number and target in own:
                own[target].trained += number
            elif number:
                shape = shape_of(added[0])
                found.append(Weight(module=name, name=target, shape=shape, size=0, trained=number))
    return found


def coverage(model: Any) -> Coverage:
    """Returns which share of the weight matrices of a model is trained or has an adapter.

    Args:
        model: A model with its tuner.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = base_modules(base)
    embeddings = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    head = _inside(base.get_output_embeddings())
    embeddings |= {name for name, module in modules.items() if module is head}
    matrices = [
        weight
        for weight in weights_of(model)
        if len(weight.shape) > 1
        and weight.module not in embeddings
        and not weight.name.endswith("bias")
    ]
    total = sum(weight.size for weight in matrices) or 1
    left: dict[str, int] = defaultdict(int)
    for weight in matrices:
        if not weight.trained:
            left[weight.kind] += weight.size
    shares = sorted(((kind, size / total) for kind, size in left.items()), key=lambda i: -i[1])
    return Coverage(share=1 - sum(left.values()) / total, left_out=dict(shares))


def parts_of(model: Any) -> dict[str, tuple[int, int]]:
    """Returns how many weights each part of a model with experts has, and how many are trained on its behalf.

    Args:
        model: A model with its tuner.

    Returns:
        `experts`, `shared experts`, `routers` and `other weights`, those that there are; nothing where the model has no
        experts.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = base_modules(base)
    choosers = set(routers(modules))
    fused = set(fused_experts(modules))
    sums: dict[str, list[int]] = {}
    for part in ("experts", "shared experts", "routers", "other weights"):
        sums[part] = [0, 0]
    for weight in weights_of(model):
        if _SHARED.search(weight.path):
            part = "shared experts"
        elif weight.module in choosers:
            part = "routers"
        elif weight.path in fused or _EXPERTS.search(weight.path):
            part = "experts"
        else:
            part = "other weights"
        sums[part][0] += weight.size
        sums[part][1] += weight.trained
    if not sums["experts"][0]:
        return {}
    return {part: (total, trained) for part, (total, trained) in sums.items() if total}


def base_modules(base: Any) -> dict[str, nn.Module]:
    """Returns the modules of a model by the names that they have without a tuner.

    Args:
        base: The model of Transformers, its modules perhaps wrapped.
    """
    return {name: module for name, module, _ in _walk("", base)}


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Yields each module as it was, with what was put around it, the outermost first."""
    around = []
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        around.append(module)
        module = _next(module)
    yield name, module, around
    for key, child in module.named_children():
        yield from _walk(f"{name}.{key}" if name else key, child)


def _inside(module: Any) -> Any:
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = _next(module)
    return module


def _next(module: Any) -> Any:
    return module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
