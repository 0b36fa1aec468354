"""Linear layers and embeddings of which each rank of a group has a part, by the styles of Transformers' plans.

In come whole layers, perhaps with a LoRA on them, out come the same modules with parts of their weights, whose products
are exact: what is copied to all ranks has its gradient summed over them, and what each rank has a summand of is summed.
A `Split` says of which dimension a parameter is a part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a parameter is parted.

    Attributes:
        dim: The dimension.
        sizes: The length of each rank's part of it.
    """

    dim: int
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """The length of the whole."""
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The ranks that share layers.

    Attributes:
        group: Of torch.distributed.
        rank: This one among them.
        size: How many there are.
    """

    group: Any
    rank: int
    size: int

    def split(self, dim: int, length: int) -> Split:
        """Returns how a dimension is parted: the first ranks have one more where it does not divide."""
        least, more = divmod(length, self.size)
        sizes = tuple(least + (rank < more) for rank in range(self.size))
        return Split(dim=dim, sizes=sizes)

    def part(self, value: Tensor, split: Split) -> Tensor:
        """Returns this rank's part of a whole."""
        start = sum(split.sizes[: self.rank])
        return value.narrow(split.dim, start, split.sizes[self.rank])

    def whole(self, value: Tensor, split: Split) -> Tensor:
        """Returns the whole of parts; all ranks of the group call it."""
        longest = max(split.sizes)
        padding = [0, 0] * (value.dim() - 1 - split.dim % value.dim())
        missing = longest - value.shape[split.dim]
        padded = functional.pad(value, [*padding, 0, missing]) if missing else value
        parts = [
            torch.empty_like(padded, memory_format=torch.contiguous_format)
            for _ in range(self.size)
        ]
        dist.all_gather(parts, padded.contiguous(), group=self.group)
        kept = [
            part.narrow(split.dim, 0, size) for part, size in zip(parts, split.sizes, strict=True)
        ]
        return torch.cat(kept, dim=split.dim)

    def sum(self, value: Tensor) -> Tensor:
        """Returns the sum over the ranks."""
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total


class _Copy(torch.autograd.Function):
    """The same on all ranks; each of them adds to the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradients[0]), None


class _Sum(torch.autograd.Function):
    """The sum of what the ranks have; each summand has its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:  # noqa: ARG004
        return group.sum(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class _Join(torch.autograd.Function):
    """The parts of all ranks side by side, of which all go on with the whole."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return group.whole(value, split)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.part(gradients[0], ctx.split).contiguous(), None, None


class _Part(torch.autograd.Function):
    """This rank's part of what all ranks have."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group, split: Split) -> Tensor:
        ctx.group, ctx.split = group, split
        return group.part(value, split).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.group.whole(gradients[0], ctx.split), None, None


def _copy(value: Tensor, group: Group) -> Tensor:
    found: Tensor = _Copy.apply(value, group)  # type: ignore[no-untyped-call]
    return found


def _sum(value: Tensor, group: Group) -> Tensor:
    found: Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
    return found


class Parter:
    """Parts the layers of a model among the ranks of a group, in place."""

    def __init__(self, group: Group, model: nn.Module) -> None:
        self.group = group
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self._tied = {parameter for parameter, number in owners.items() if number > 1}
        self.splits: dict[int, tuple[nn.Parameter, Split]] = {}
        """By the id of a parameter that is a part: itself, which keeps the id its own, and how it is parted."""
        # a tied parameter is parted once
        self._parts: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        # what was copied last, its copy, and whether that has a gradient
        self._last: tuple[Tensor | None, Tensor | None, bool] = (None, None, False)

    def part(self, name: str, module: nn.Module, style: str) -> None:
        """Parts one layer.

        Args:
            name: Of the layer, for errors.
            module: The layer, an adapter around it, or copies of it of which one is trained.
            style: As a plan of Transformers calls it.

        Raises:
            ConfigError: The style, or the kind of layer, cannot be parted.
        """
        if isinstance(module, ModulesToSaveWrapper):
            for inner in (module.original_module, *module.modules_to_save.values()):
                self.part(name, inner, style)
            return
        parts: dict[str, Callable[[str, nn.Module], None]] = {
            "colwise": self._columns,
            "colwise_gather_output": self._joined_columns,
            "colwise_rep": self._joined_columns,
            "rowwise": self._rows,
            "rowwise_split_input": self._rows_of_whole,
            "rowwise_rep": self._rows_of_whole,
            "embedding_rowwise": self._vocabulary,
            "replicated_with_grad_allreduce": self._summed,
            "replicate": lambda _name, _module: None,
        }
        if style not in parts:
            raise ConfigError(
                f"--tensor_parallel_size cannot share {name}, whose style in the plan of this model is {style}; "
                f"expected {', '.join(parts)}; take --fsdp or --deepspeed zero3"
            )
        parts[style](name, module)

    # -- each style ----------------------------------------------------------------------------------------------

    def _columns(self, name: str, module: nn.Module) -> None:
        """Each rank has some of the outputs."""
        layer = self._linear(name, module)
        self._split(layer, "weight", 0)
        self._split(layer, "bias", 0)
        self._run_columns(layer, self._copied)
        if isinstance(module, LoraLayer):
            # A is whole and sees the whole input; of B each rank has the rows of its outputs
            for up in module.lora_B.values():
                self._split(up, "weight", 0)
                self._split(up, "bias", 0)
                self._run_columns(up, lambda inputs: _copy(inputs, self.group))

    def _run_columns(self, layer: nn.Module, copied: Callable[[Tensor], Tensor]) -> None:
        plain = layer.forward

        def forward(inputs: Tensor) -> Tensor:
            found: Tensor = plain(copied(inputs))
            return found

        layer.forward = forward

    def _copied(self, inputs: Tensor) -> Tensor:
        """Copies what several layers take, as q, k and v do, once: their gradients are added before they are summed."""
        last, copy, is_recorded = self._last
        if inputs is not last or is_recorded != torch.is_grad_enabled():
            copy = _copy(inputs, self.group)
            self._last = inputs, copy, torch.is_grad_enabled()
        assert copy is not None
        return copy

    def _joined_columns(self, name: str, module: nn.Module) -> None:
        """As above, but the outputs are joined; an adapter is whole then, and equal on all ranks."""
        layer = self._linear(name, module)
        split = self._split(layer, "weight", 0)
        self._split(layer, "bias", 0)
        plain, group = layer.forward, self.group

        def forward(inputs: Tensor) -> Tensor:
            found = plain(self._copied(inputs))
            at_end = Split(dim=-1, sizes=split.sizes)
            joined: Tensor = _Join.apply(found, group, at_end)  # type: ignore[no-untyped-call]
            return joined

        layer.forward = forward

    def _rows(self, name: str, module: nn.Module) -> None:
        """Each rank has some of the inputs, and of each output a summand."""
        layer = self._linear(name, module)
        self._split(layer, "weight", 1)
        self._run_rows(layer)
        if isinstance(module, LoraLayer):
            # A has the columns of this rank's inputs; its product is summed, so B is whole
            for down in module.lora_A.values():
                self._split(down, "weight", 1)
                self._run_rows(down)

    def _run_rows(self, layer: nn.Module, split: Split | None = None) -> None:
        group = self.group

        def forward(inputs: Tensor) -> Tensor:
            if split is not None:
                inputs = _Part.apply(inputs, group, split)  # type: ignore[no-untyped-call]
            weight: Any = layer.weight
            bias: Any = layer.bias
            found = _sum(functional.linear(inputs, weight), group)
            # once, not once a rank
            return found if bias is None else found + bias

        layer.forward = forward

    def _rows_of_whole(self, name: str, module: nn.Module) -> None:
        """As above, where each rank has all inputs; an adapter is whole then, and equal on all ranks."""
        layer = self._linear(name, module)
        split = self._split(layer, "weight", 1)
        self._run_rows(layer, Split(dim=-1, sizes=split.sizes))

    def _vocabulary(self, name: str, module: nn.Module) -> None:
        """Each rank knows some of the tokens; an adapter is whole, and equal on all ranks."""
        layer: Any = module.base_layer if isinstance(module, LoraLayer) else module
        if not isinstance(layer, nn.Embedding):
            raise ConfigError(
                f"--tensor_parallel_size cannot share {name}: expected an embedding, found {type(layer).__name__}"
            )
        split = self._split(layer, "weight", 0)
        start, size = sum(split.sizes[: self.group.rank]), split.sizes[self.group.rank]
        whole_padding = layer.padding_idx
        padding = None if whole_padding is None else whole_padding - start
        own_padding = padding if padding is not None and 0 <= padding < size else None
        plain, group = layer.forward, self.group

        def forward(ids: Tensor) -> Tensor:
            own = ids - start
            is_foreign = (own < 0) | (own >= size)
            # an adapter on the layer reads it too, and knows all tokens
            layer.padding_idx = own_padding
            found = plain(own.masked_fill(is_foreign, 0))
            layer.padding_idx = whole_padding
            return _sum(found.masked_fill(is_foreign[..., None], 0.0), group)

        layer.forward = forward  # type: ignore[method-assign, assignment]

    def _summed(self, name: str, module: nn.Module) -> None:  # noqa: ARG002
        """Whole on each rank, which sees some of what it is applied to."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.group.sum)  # type: ignore[no-untyped-call]

    # -- parameters ----------------------------------------------------------------------------------------------

    def _linear(self, name: str, module: nn.Module) -> nn.Module:
        layer: Any = module.base_layer if isinstance(module, LoraLayer) else module
        if not isinstance(layer, nn.Linear):
            raise ConfigError(
                f"--tensor_parallel_size cannot share {name}: expected a linear layer, found {type(layer).__name__}"
            )
        return layer

    def _split(self, layer: nn.Module, name: str, dim: int) -> Split:
        """Puts this rank's part in the place of a parameter, where the layer has it."""
        whole = getattr(layer, name, None)
        if whole is None:
            return Split(dim=dim, sizes=())
        split = self.group.split(dim, whole.shape[dim])
        part = self._parts[id(whole)][1] if id(whole) in self._parts else None
        if part is None:
            own = self.group.part(whole.detach(), split)
            own = own.clone(memory_format=torch.contiguous_format)
            part = nn.Parameter(own, requires_grad=whole.requires_grad)
            self.splits[id(part)] = (part, split)
            if id(whole) in self._tied:
                self._parts[id(whole)] = (whole, part)
        if self.splits[id(part)][1] != split:
            raise ConfigError(
                f"--tensor_parallel_size cannot share {name}: tied layers are parted in different ways"
            )
        setattr(layer, name, part)
        return split

    def forget_wholes(self) -> None:
        """Lets go of the whole parameters, once all layers are parted."""
        self._parts.clear()
