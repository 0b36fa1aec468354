"""The stages of a pipeline: which layers each of them has, and a model that has those of one stage alone.

In comes the class of a model of Transformers, out comes a subclass that loads, holds and saves the modules of one stage
under the names that they have in the whole model. In the place of another stage's layer stands one that passes hidden
states on, so that a decoder of fewer layers runs as it is. Modules that are elsewhere are kept aside without weights,
and are put back where a tuner must see all names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sftcore.errors import ConfigError

KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
)
"""The types of models that can be split: an embedding, layers that each take the output of the last, a norm, a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The layers of each stage.

    Attributes:
        layers: Of each stage; every stage has one or more.
        parameters: The parameters of each stage, those of embedding and head included.
    """

    layers: tuple[range, ...]
    parameters: tuple[int, ...]

    def describe(self) -> str:
        """Returns the stages in a line, for people."""
        parts = []
        for number, (layers, count) in enumerate(zip(self.layers, self.parameters, strict=True)):
            names = ["embedding"] if number == 0 else []
            names.append(
                f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
            )
            if number == len(self.layers) - 1:
                names += ["norm", "head"]
            parts.append(f"stage {number}: {', '.join(names)} ({count:,} parameters)")
        return "; ".join(parts)


def split_layers(costs: list[int], num_stages: int, *, before: int = 0, behind: int = 0) -> Split:
    """Returns the split whose largest stage is the smallest.

    Args:
        costs: The parameters of each layer.
        num_stages: The stages.
        before: What the first stage has besides layers: the embedding.
        behind: What the last one has: the norm and the head.

    Raises:
        ConfigError: There are fewer layers than stages.
    """
    if len(costs) < num_stages:
        raise ConfigError(
            f"--pipeline_parallel_size {num_stages} is out of range: the model has {len(costs)} layers, and each stage "
            "needs one"
        )
    costs = [*costs]
    costs[0] += before
    costs[-1] += behind
    sums = [0, *accumulate(costs)]
    # of the first layers in so many stages: the largest stage, the squares of all, and where they begin
    best: list[tuple[int, int, tuple[int, ...]] | None]
    best = [None, *((one, one * one, (0,)) for one in sums[1:])]
    for _ in range(1, num_stages):
        longer: list[tuple[int, int, tuple[int, ...]] | None] = [None] * len(sums)
        for end in range(1, len(sums)):
            found = []
            for start in range(1, end):
                if (rest := best[start]) is not None:
                    cost = sums[end] - sums[start]
                    found.append((max(rest[0], cost), rest[1] + cost * cost, (*rest[2], start)))
            longer[end] = min(found, default=None)
        best = longer
    chosen = best[-1]
    assert chosen is not None
    borders = [*chosen[2], len(costs)]
    return Split(
        layers=tuple(range(start, end) for start, end in pairwise(borders)),
        parameters=tuple(sums[end] - sums[start] for start, end in pairwise(borders)),
    )


class Passed(nn.Module):
    """Stands for a layer of another stage: what comes in goes out."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Returns the hidden states as they are."""
        return hidden


class Elsewhere(nn.Module):
    """Stands for an embedding or a head of another stage, which is never called here."""


class Parts:
    """The modules of a model that one stage has.

    Attributes:
        model: The causal language model, without its tuner.
        number: The stage, from 0.
        split: The layers of all stages.
        is_tied: Whether the head has the weight of the embedding; first and last stage both hold it then.
    """

    def __init__(self, model: Any, num_stages: int, number: int) -> None:
        self.model = model
        self.number = number
        decoder = model.base_model
        names = {id(module): name for name, module in model.named_modules()}
        self.decoder = names[id(decoder)]
        self.embedding = names[id(model.get_input_embeddings())]
        self.head = names[id(model.get_output_embeddings())]
        self.norm = names[id(decoder.norm)]
        self.layers = names[id(decoder.layers)]
        self.is_tied = bool(model.config.tie_word_embeddings)
        self.split = split_layers(
            [_size(layer) for layer in decoder.layers],
            num_stages,
            before=_size(model.get_input_embeddings()),
            behind=_size(decoder.norm) + _size(model.get_output_embeddings()),
        )
        self._aside: dict[str, nn.Module] = {}
        self.take_out()
        if not self.is_last:
            # nothing here has the weight of the embedding besides itself
            model.all_tied_weights_keys = {}

    @property
    def is_first(self) -> bool:
        """Whether tokens come in here."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether losses come out here."""
        return self.number == len(self.split.layers) - 1

    @property
    def shares_embedding(self) -> bool:
        """Whether another stage holds a weight of this one too."""
        return self.is_tied and (self.is_first or self.is_last)

    def take_out(self) -> None:
        """Puts what other stages have aside."""
        own = self.split.layers[self.number]
        count = self.split.layers[-1].stop
        out: dict[str, nn.Module] = {
            f"{self.layers}.{layer}": Passed() for layer in range(count) if layer not in own
        }
        if not self.is_first and not (self.is_last and self.is_tied):
            out[self.embedding] = Elsewhere()
        if not self.is_last:
            out |= {self.norm: Passed(), self.head: Elsewhere()}
        self._aside = {name: swap(self.model, name, module) for name, module in out.items()}

    @contextlib.contextmanager
    def all_modules(self) -> Iterator[None]:
        """A block in which the model has the modules of all stages, those of others without weights."""
        for name, module in self._aside.items():
            swap(self.model, name, module)
        if self.is_tied:
            head = self.model.get_submodule(self.head)
            head.weight = self.model.get_submodule(self.embedding).weight
        try:
            yield
        finally:
            self.take_out()

    def stages_of(self, name: str) -> tuple[int, ...]:
        """Returns the stages that hold a parameter of the model, by its name."""
        last = len(self.split.layers) - 1
        if found := re.match(rf"{re.escape(self.layers)}\.(\d+)\.", name):
            layer = int(found[1])
            return tuple(n for n, layers in enumerate(self.split.layers) if layer in layers)
        if name.startswith((f"{self.embedding}.", f"{self.head}.")) and self.is_tied:
            return (0, last)
        return (0,) if name.startswith(f"{self.embedding}.") else (last,)

    def check_trained(self, *, is_adapter: bool) -> None:
        """Looks at what a tuner has set to be trained, while all modules are there.

        Raises:
            ConfigError: A stage has nothing to train, or a weight that two stages share has an adapter.
        """
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        ends = (f"{self.embedding}.", f"{self.head}.")
        if is_adapter and self.is_tied and any(name.startswith(ends) for name in trained):
            raise ConfigError(
                f"{self.embedding} shares its weight with {self.head}, and they lie in two stages of the pipeline: "
                "neither can have an adapter or be trained beside one; leave them out of --target_modules and "
                "--modules_to_save, or take --tuner_type full"
            )
        busy = {stage for name in trained for stage in self.stages_of(name)}
        for number, layers in enumerate(self.split.layers):
            if number not in busy:
                raise ConfigError(
                    f"stage {number} of the pipeline (layers {layers[0]}-{layers[-1]}) has nothing to train; take "
                    "fewer stages, or train something in these layers"
                )

    def check_passes(self) -> None:
        """Tries whether the decoder does nothing with hidden states but what its layers and its norm do.

        Raises:
            ConfigError: It does, so that each stage would do it again.
        """
        own = [f"{self.layers}.{layer}" for layer in self.split.layers[self.number]]
        taken = {name: swap(self.model, name, Passed()) for name in (*own, self.norm)}
        try:
            weight = next(taken[own[0]].parameters())
            generator = torch.Generator().manual_seed(0)
            width = self.model.config.get_text_config().hidden_size
            hidden = torch.randn(1, 3, width, generator=generator).to(weight)
            with torch.no_grad():
                decoder = self.model.base_model
                found = decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
        finally:
            for name, module in taken.items():
                swap(self.model, name, module)
        if not torch.equal(found, hidden):
            raise ConfigError(
                f"{type(self.model).__name__} cannot be split into stages, as its decoder changes hidden states "
                "outside of its layers; take --fsdp or --deepspeed zero3 instead of --pipeline_parallel_size"
            )


def stage_class(kind: Any, num_stages: int, number: int) -> Any:
    """Returns a subclass of a model whose objects have the modules of one stage, and the others aside.

    Args:
        kind: A causal language model of Transformers, of one of `KINDS`.
        num_stages: The stages of the pipeline.
        number: The stage.
    """

    def make(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        kind.__init__(self, config, *arguments, **named)
        self.parts = Parts(self, num_stages, number)

    # the name is what a saved configuration says of the architecture
    return type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})


def swap(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts a module in the place of another one, and returns that."""
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    before = owner.get_submodule(last)
    setattr(owner, last, module)
    return before


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
