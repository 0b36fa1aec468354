"""Tensor parallelism: each rank of a group has a part of every layer, and all of them work on the same examples.

Which layer is parted how is Transformers' plan of the model; the parting is done here, after the tuner is on, so that
a LoRA starts as on one process and may sit on any layer. Groups go side by side: over them gradients are averaged as in
data parallelism. Each rank computes the whole loss from joined logits, a chunk of tokens at a time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.spread import SpreadEngine
from sftcore.train.distributed.tensor_layers import Group, Parter, Split
from sftcore.train.distributed.world import World
from sftcore.tuners.experts import refuse_parameters

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

# layers whose parts are heads
_OF_HEADS = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
}


class TensorParallelEngine(SpreadEngine):
    """Layers are shared within groups of ranks, data among the groups."""

    flag = "--tensor_parallel_size"
    # those of a group have the same rows and the same losses, so they run the same passes
    shares_weights = False

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self.name = f"tensor parallel ({config.tensor_parallel_size})"
        self._parter: Parter | None = None
        self._group: Group | None = None

    def _check_config(self) -> None:
        super()._check_config()
        config = self.config
        if config.tuner_type not in ("full", "freeze", "lora") or config.use_dora:
            name = "use_dora true" if config.use_dora else f"tuner_type {config.tuner_type}"
            raise ConfigError(
                f"--{name} cannot be used with --tensor_parallel_size: it computes with whole weights, and a process "
                "has parts of them; take --tuner_type lora, full or freeze, or --fsdp"
            )
        if config.torch_compile:
            raise ConfigError(
                "--torch_compile cannot be used with --tensor_parallel_size: sums over processes break its graphs; "
                "leave one of both out"
            )

    def check_new_tokens(self) -> None:
        """Refuses rows beside an adapter, which are taken out of whole weights."""
        if not self.config.trains_weights:
            raise ConfigError(
                "--new_special_tokens cannot be used with --tensor_parallel_size and an adapter: its rows stand beside "
                "a whole embedding, and a process has a part of it; take --tuner_type full, or --fsdp"
            )

    def __enter__(self) -> Engine:
        """Joins the other ranks, and those of its group."""
        super().__enter__()
        size = self.world.model_parallel_size
        for start in range(0, self.world.size, size):
            ranks = list(range(start, start + size))
            group = dist.new_group(ranks)  # every rank takes part in making every group
            if self.world.rank in ranks:
                self._group = Group(group=group, rank=self.world.rank - start, size=size)
        return self

    # -- from the whole model to parts ---------------------------------------------------------------------------

    def spread(self, model: Any) -> None:
        """Parts the layers by the plan of the model, then moves what is left to the device of this rank."""
        assert self._group is not None
        refuse_parameters(model, "--tensor_parallel_size")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = planned_layers(base)
        check_sizes(base, layers, self._group.size)
        self._parter = Parter(self._group, model)
        for name, (module, style) in layers.items():
            self._parter.part(name, module, style)
        self._parter.forget_wholes()
        if torch.cuda.is_available():
            model.to(torch.device("cuda", self.world.local_rank))

    # -- wholes and parts ----------------------------------------------------------------------------------------

    def _split_of(self, parameter: Tensor) -> Split | None:
        assert self._parter is not None
        found = self._parter.splits.get(id(parameter))
        return found[1] if found else None

    def is_spread(self, parameter: Tensor) -> bool:
        """Whether it is a parameter of which this rank has a part."""
        return self._split_of(parameter) is not None

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        """Returns the shape of the whole."""
        shape, split = list(parameter.shape), self._split_of(parameter)
        if split is not None:
            shape[split.dim] = split.total
        return torch.Size(shape)

    def is_like(self, parameter: Tensor, value: Tensor) -> bool:
        """Whether a value of the optimizer is as large as the part that it belongs to."""
        return self.is_spread(parameter) and value.shape == parameter.shape

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Joins the parts of the ranks of a group."""
        split = self._split_of(parameter)
        assert split is not None
        assert self._group is not None
        return self._group.whole(value, split)

    def part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Returns this rank's part."""
        split = self._split_of(parameter)
        assert split is not None
        assert self._group is not None
        return self._group.part(value, split)

    @property
    def part_group(self) -> Any:
        """The ranks that share layers."""
        assert self._group is not None
        return self._group.group

    def trainer_class(self) -> type[SftTrainer]:
        """The Trainer that averages gradients over groups."""
        from sftcore.train.distributed.tensor_trainer import TensorTrainer  # it takes an engine

        return TensorTrainer


def planned_layers(base: Any) -> dict[str, tuple[nn.Module, str]]:
    """Returns the layers that the plan of a model names, each with its style.

    Args:
        base: A causal language model of Transformers, perhaps with adapters on its layers.

    Raises:
        ConfigError: The model has no plan.
    """
    plan: dict[str, str] = dict(getattr(base, "tp_plan", None) or {})
    if not plan:
        raise ConfigError(
            f"--tensor_parallel_size cannot be used with {type(base).__name__}: Transformers has no plan to share its "
            "layers; take --fsdp or --deepspeed zero3"
        )
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in base.named_modules():
        style = plan.get(re.sub(r"\d+", "*", name))
        if style is not None:
            found[name] = (module, style)
    parameters = {re.sub(r"\d+", "*", name) for name, _ in base.named_parameters()}
    for name in sorted(plan.keys() & parameters):
        # weights without a layer of their own, as those of experts
        raise ConfigError(
            f"--tensor_parallel_size cannot share {name}, whose style in the plan of this model is {plan[name]}; take "
            "--fsdp or --deepspeed zero3"
        )
    return found


def check_sizes(base: Any, layers: dict[str, tuple[nn.Module, str]], size: int) -> None:
    """Checks that the parts of all layers are equal.

    Raises:
        ConfigError: They are not; it says which numbers of processes fit.
    """
    config = base.config.get_text_config()
    lengths: dict[str, int] = {}
    for name, (module, style) in layers.items():
        weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)
        last = name.rsplit(".", 1)[-1]
        if style == "colwise":
            heads = getattr(config, _OF_HEADS.get(last, ""), None)
            lengths[_OF_HEADS[last] if heads else last] = heads or weight.shape[0]
        elif style.startswith("rowwise") and weight is not None:
            lengths[last] = weight.shape[1]
    if all(length % size == 0 for length in lengths.values()):
        return
    fitting = [
        str(number)
        for number in range(2, min(lengths.values()) + 1)
        if all(length % number == 0 for length in lengths.values())
    ]
    shown = ", ".join(f"{name} {length}" for name, length in lengths.items() if length % size)
    what = f"{' or '.join(fitting)} would fit" if fitting else "no number of processes fits"
    raise ConfigError(
        f"--tensor_parallel_size {size} does not divide {shown} of this model: {what}; or take --fsdp"
    )
