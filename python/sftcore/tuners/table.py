"""What is trained, counted by kind of module."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from rich.console import Console
from rich.table import Table

from sftcore.models.shapes import full_shape, full_size

if TYPE_CHECKING:
    from torch import nn


@dataclass(kw_only=True, slots=True)
class TrainedKind:
    """Modules of one name and shape, of which something is trained.

    Attributes:
        modules: Their paths.
        parameters: What is trained in all of them.
    """

    modules: set[str] = field(default_factory=set)
    parameters: int = 0


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the number of all parameters and of the trained ones."""
    total = sum(_size(parameter) for parameter in model.parameters())
    trained = sum(_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return total, trained


def describe_parameters(model: nn.Module) -> str:
    """Returns a table of the trained parameters: kind of module, number, shape, parameters, share of all."""
    total, trained = count_parameters(model)
    table = Table(box=None, pad_edge=False)
    table.add_column("trained")
    for heading in ("modules", "shape", "parameters", "share"):
        table.add_column(heading, justify="right")
    for (name, shape), kind in trained_kinds(model).items():
        share = f"{kind.parameters / total:.2%}"
        table.add_row(name, f"{len(kind.modules):,}", shape, f"{kind.parameters:,}", share)
    table.add_row("all", "", "", f"{trained:,}", f"{trained / total:.2%}")
    console = Console(file=io.StringIO(), width=100, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def trained_kinds(model: nn.Module) -> dict[tuple[str, str], TrainedKind]:
    """Returns the modules of which something is trained, by name and shape."""
    kinds: dict[tuple[str, str], TrainedKind] = defaultdict(TrainedKind)
    for owner, shape, parameter in _trained(model):
        last = [part for part in owner.split(".") if not part.isdigit()][-1]
        kind = kinds[last, shape]
        kind.modules.add(owner)
        kind.parameters += _size(parameter)
    return dict(kinds)


def _trained(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields trained parameters with the module that they belong to, which is the adapted one for an adapter."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        paths = [".".join(parts[:length]) for length in range(1, len(parts))]
        owner = next(
            (
                path
                for path in paths
                if isinstance(modules[path], BaseTunerLayer | AuxiliaryTrainingWrapper)
            ),
            paths[-1],
        )
        yield owner, _shape(modules[owner], parameter), parameter


def _shape(owner: nn.Module, parameter: nn.Parameter) -> str:
    home = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    weight = getattr(home, "weight", parameter)
    quantized = getattr(weight, "quant_state", None)
    shape = full_shape(weight) if quantized is None else quantized.shape
    return " x ".join(map(str, shape))


def _size(parameter: nn.Parameter) -> int:
    """Returns the number of weights, of which 4-bit ones lie two in a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return int(full_size(parameter) if quantized is None else quantized.shape.numel())
