"""What engines have in common whose ranks hold parts of the parameters: between a whole tensor and its parts.

A model is loaded, tried and given its tuner as a whole, so that it starts as it does on one process; then `share`
spreads its parameters in place. What goes to disk is whole: a checkpoint is that of one process, which any number
of processes and any such engine can go on from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError, SftcoreError
from sftcore.models.dtypes import choose_dtypes
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.world import World

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

OPTIMIZER_FILE = "optimizer.pt"
# update each number by its own gradient and state, so that a part is updated as within the whole
_ELEMENTWISE = {
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adamw_torch",
    "adamw_torch_fused",
    "asgd",
    "auto",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
}


class SpreadEngine(Engine, ABC):
    """An engine whose ranks hold parts of the parameters."""

    flag = ""
    """The flag that asks for it, for errors."""
    shares_weights = True

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self.whole_bytes = self.own_bytes = 0
        # of a model that is too large to be tried on this device
        self._attention: str | None = None
        self._check_config()

    def _check_config(self) -> None:
        config, flag = self.config, self.flag
        name = config.optim.removeprefix("torch.optim.").lower()
        if name not in _ELEMENTWISE:
            raise ConfigError(
                f"--optim {config.optim} cannot be used with {flag}: it looks at whole matrices, or keeps a state of "
                "its own form, and a process has parts of them; take adamw_torch, or leave out the flag"
            )
        if config.weight_bits is not None:
            raise ConfigError(
                f"--quant_bits {config.weight_bits} cannot be used with {flag}: packed weights cannot be parted; "
                "leave out one of both (plain data parallelism has the whole quantized model on each process)"
            )
        dtypes = choose_dtypes(config.torch_dtype, trains_weights=config.trains_weights)
        if dtypes.compute == torch.float16:
            raise ConfigError(
                f"--torch_dtype float16 cannot be used with {flag}: its loss scale is not shared among processes; "
                "take bfloat16 or float32"
            )
        if config.activation_offload or config.gradient_checkpointing_kind == "offload":
            raise ConfigError(
                f"activations are not offloaded with {flag}; take --gradient_checkpointing true"
            )

    # -- from the whole model to parts ---------------------------------------------------------------------------

    def place(self, model: Any) -> Any:
        """Puts a model where it can be tried: on the device of this rank, or on the host where it is too large."""
        if not torch.cuda.is_available():
            return model
        free, _ = torch.cuda.mem_get_info()
        if 1.2 * num_bytes(model.parameters()) <= free:
            return super().place(model)
        attention = model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            # kernels of a GPU do not run on the host
            self._attention = attention
            model.set_attn_implementation("sdpa")
        return model

    def share(self, model: Any) -> None:
        """Spreads the parameters of a model that has its tuner."""
        self.whole_bytes = num_bytes(model.parameters())
        if self._attention is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            base.set_attn_implementation(self._attention)
        self.spread(model)
        self.own_bytes = num_bytes(self.local(parameter) for parameter in model.parameters())
        for module in model.modules():
            if any(self.is_spread(p) for p in module.parameters(recurse=False)):
                module.register_load_state_dict_pre_hook(self._part_loaded)

    def _part_loaded(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Takes this rank's part of the whole tensors that are loaded into a module."""
        for name, parameter in module.named_parameters(recurse=False):
            value = state.get(prefix + name)
            if value is not None and self.is_spread(parameter):
                if value.shape != self.whole_shape(parameter):
                    continue  # the module says so
                state[prefix + name] = self.part(parameter, value)

    def settle(self, model: Any) -> None:
        """Makes each rank hold its parts and nothing more, as after a step."""

    # -- each engine has its own answer --------------------------------------------------------------------------

    @abstractmethod
    def spread(self, model: Any) -> None:
        """Spreads the parameters of a model in place."""

    @abstractmethod
    def is_spread(self, parameter: Tensor) -> bool:
        """Whether this rank has a part of a parameter, not the whole."""

    @abstractmethod
    def whole_shape(self, parameter: Tensor) -> torch.Size:
        """Returns the shape of the whole of which a parameter is a part."""

    @abstractmethod
    def is_like(self, parameter: Tensor, value: Tensor) -> bool:
        """Whether a value of the optimizer is spread as its parameter is."""

    @abstractmethod
    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Returns the whole of a value that is spread as its parameter is; all ranks call it."""

    @abstractmethod
    def part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Returns a whole value as its parameter is spread."""

    def local(self, value: Tensor) -> Tensor:
        """Returns the plain tensor that this rank has of a value."""
        return value

    @property
    @abstractmethod
    def part_group(self) -> Any:
        """The ranks whose parts are the whole."""

    def save_optimizer(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Writes the optimizer into the folder of a checkpoint; all ranks call it."""
        state = whole_optimizer(self, optimizer)
        if self.world.is_first:
            torch.save(state, folder / OPTIMIZER_FILE)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Gives the optimizer its part of what a checkpoint has."""
        load_optimizer(self, optimizer, folder / OPTIMIZER_FILE)

    @contextmanager
    def accumulating(self, model: Any) -> Iterator[None]:  # noqa: ARG002
        """What a micro-batch runs in that is not the last of its step."""
        yield

    # -- gradients -----------------------------------------------------------------------------------------------

    def clip_gradients(self, model: Any, max_norm: float) -> Tensor:
        """Returns the norm of all gradients, and scales them down to `max_norm` where it is larger."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in parameters:
            parts[self.is_spread(parameter)].append(self.local(parameter.grad))
        device = self.local(parameters[0]).device
        spread, whole = (_square(parts[key], device) for key in (True, False))
        dist.all_reduce(spread, group=self.part_group)
        norm = (spread + whole).sqrt().float()
        if max_norm != math.inf:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*parts[True], *parts[False]], factor)
        return norm

    # -- what is said and checked --------------------------------------------------------------------------------

    def trainer_class(self) -> type[SftTrainer]:
        """The Trainer that leaves the model as it is spread."""
        from sftcore.train.distributed.spread_trainer import SpreadTrainer  # it takes an engine

        return SpreadTrainer

    def describe(self) -> str | None:
        """A line on how the ranks share the run."""
        return (
            f"{self.world.size} processes: {self.name}; each has {self.own_bytes / 2**20:,.1f} of "
            f"{self.whole_bytes / 2**20:,.1f} MiB of parameters"
        )

    def check(self, trainer: SftTrainer) -> None:
        """Holds what runs to what was asked for: the parameters are spread.

        Raises:
            SftcoreError: They are not, or fewer processes run than were asked for.
        """
        super().check(trainer)
        if self.own_bytes >= self.whole_bytes:
            raise SftcoreError(
                f"asked for {self.name}, but each process has all {self.whole_bytes:,} bytes of the parameters"
            )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors, each counted once."""
    each = {id(tensor): tensor.numel() * tensor.element_size() for tensor in list(tensors)}
    return sum(each.values())


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Returns the squared norm of tensors as one vector."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.to(device) for norm in norms]).double().square().sum()


def whole_state(engine: SpreadEngine, model: Any) -> dict[str, Tensor]:
    """Returns what `save_pretrained` takes of a model, whole and on the host; all ranks call it, the first has it.

    Of a model with an adapter the frozen weights are left out, but for those beside the embedding, which PEFT
    may save.
    """
    has_adapter = hasattr(model, "peft_config")
    kept: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    outer = _outer_parameters(model) if has_adapter else set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        is_base = isinstance(value, nn.Parameter) and not value.requires_grad
        if has_adapter and is_base and id(value) not in outer and ".default" not in name:
            continue
        if id(value) not in kept:
            found = value.detach()
            if isinstance(value, nn.Parameter) and engine.is_spread(value):
                found = engine.whole(value, found)
            # tied parameters stay one tensor
            kept[id(value)] = found.cpu() if engine.world.is_first else torch.empty(0)
        state[name] = kept[id(value)]
    return state if engine.world.is_first else {}


def _outer_parameters(model: Any) -> set[int]:
    base = model.get_base_model()
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    return {id(p) for module in modules if module is not None for p in module.parameters()}


def whole_optimizer(engine: SpreadEngine, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state of an optimizer as that of one process; all ranks call it, the first has it."""
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        parameter, kept = parameters[number], {}
        for name, value in values.items():
            whole = value
            if isinstance(value, Tensor) and engine.is_like(parameter, value):
                whole = engine.whole(parameter, value)
            if engine.world.is_first:
                kept[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        found[number] = kept
    return {**state, "state": found}


def load_optimizer(engine: SpreadEngine, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Gives an optimizer this rank's part of the state of one process.

    Raises:
        ValueError: The state is of other parameters.
    """
    # mapped, so that ranks of a node read the same pages
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        if number >= len(parameters):
            raise ValueError(f"the optimizer has {len(parameters)} parameters, its state more")
        parameter = parameters[number]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and engine.is_spread(parameter):
                if value.shape != engine.whole_shape(parameter):
                    raise ValueError(
                        f"the state of parameter {number} has shape {list(value.shape)}, the parameter "
                        f"{list(engine.whole_shape(parameter))}"
                    )
                # a copy of its own, as the optimizer writes into it
                part = engine.part(parameter, value)
                values[name] = part.clone(memory_format=torch.contiguous_format)
    optimizer.load_state_dict(state)
