"""What is trained, counted by kind of module."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sftcore.tuners.coverage import parts_of, size_of, weights_of

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
    total = sum(size_of(parameter) for parameter in model.parameters())
    trained = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return total, trained


def describe_parameters(model: nn.Module) -> str:
    """Returns a table of the trained parameters: kind of module, number, shape, parameters, share of all.

    Where the model has experts, it ends with what is trained of them, of shared experts, routers and the rest.
    """
    total, trained = count_parameters(model)
    table = Table(box=None, pad_edge=False)
    table.add_column("trained")
    for heading in ("modules", "shape", "parameters", "share"):
        table.add_column(heading, justify="right")
    for (name, shape), kind in trained_kinds(model).items():
        share = f"{kind.parameters / total:.2%}"
        table.add_row(name, f"{len(kind.modules):,}", shape, f"{kind.parameters:,}", share)
    table.add_row("all", "", "", f"{trained:,}", f"{trained / total:.2%}")
    for part, (size, number) in parts_of(model).items():
        share = f"{number / size:.2%} of its {size:,}" if number else f"frozen, {size:,}"
        table.add_row(f"in {part}", "", "", f"{number:,}", share)
    console = Console(file=io.StringIO(), width=100, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def trained_kinds(model: nn.Module) -> dict[tuple[str, str], TrainedKind]:
    """Returns the modules of which something is trained, by name and shape."""
    kinds: dict[tuple[str, str], TrainedKind] = defaultdict(TrainedKind)
    weights = weights_of(model)
    main = {weight.module: weight.shape for weight in weights if weight.name == "weight"}
    for weight in weights:
        if not weight.trained:
            continue
        # a bias is of the kind of its weight
        shape = main.get(weight.module, weight.shape) if weight.name == "bias" else weight.shape
        kind = kinds[weight.kind, " x ".join(map(str, shape))]
        kind.modules.add(weight.module)
        kind.parameters += weight.trained
    return dict(kinds)
