"""FSDP2: parameters, gradients and optimizer state are spread over the ranks, a layer is whole only while it runs.

torch's `fully_shard` is applied here, on a CPU as on GPUs, as accelerate runs plain data parallelism in its place where
there is no GPU. Units are the layers of the decoder; the embedding, where it is not tied, is one more, and all else,
the head among it, is whole from the forward to the end of the backward pass, so that the chunks of the loss find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError, SftcoreError
from sftcore.models.dtypes import choose_dtypes
from sftcore.train.distributed.optimizer_shards import load_shards, save_shard
from sftcore.train.distributed.spread import SpreadEngine
from sftcore.train.distributed.world import World

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer


class FsdpEngine(SpreadEngine):
    """Fully sharded data parallelism, perhaps with several copies of the model."""

    flag = "--fsdp"

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.options = config.fsdp_options
        super().__init__(config, world)
        self.name = f"fsdp ({config.fsdp})"
        self.shard_size = world.size
        if self.options.is_hybrid:
            self.shard_size = self.options.shard_size or world.local_size
        self._mesh: Any = None
        if self.options.shards_state:
            self.state_format = "fsdp shards"

    def _check_config(self) -> None:
        super()._check_config()
        config, world = self.config, self.world
        if world.size < 2:
            raise ConfigError(
                "--fsdp has no effect on one process; start two or more (NPROC_PER_NODE=2 sftcore train ...), or leave "
                "it out"
            )
        if config.tuner_type == "adalora":
            raise ConfigError(
                "--tuner_type adalora cannot be trained with --fsdp: it ranks the numbers of all modules together, and "
                "a process has parts of them; take --tuner_type lora or sora, or leave out --fsdp"
            )
        if self.options.cpu_offload and not torch.cuda.is_available():
            raise ConfigError("--fsdp_config cpu_offload has no effect without a GPU; leave it out")
        if self.options.is_hybrid:
            size = self.options.shard_size or world.local_size
            if world.size % size or size == world.size or size == 1:
                raise ConfigError(
                    f"--fsdp hybrid_shard shares a copy of the model among {size} of {world.size} processes, so there "
                    "are not two copies or more; start several nodes, pass --fsdp_config shard_size=N with a smaller "
                    "divisor of the processes, or take --fsdp full_shard"
                )

    # -- from the whole model to parts ---------------------------------------------------------------------------

    def spread(self, model: Any) -> None:
        """Applies `fully_shard` from the layers outward."""
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if self.shard_size < self.world.size:
            shape = (self.world.size // self.shard_size, self.shard_size)
            self._mesh = init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))
        else:
            self._mesh = init_device_mesh(kind, (self.world.size,), mesh_dim_names=("shard",))
        policy: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": self._precision(),
            "offload_policy": CPUOffloadPolicy() if self.options.cpu_offload else OffloadPolicy(),
        }
        _check_dtypes(model)
        frees = self.options.reshard_after_forward
        for unit in self._units(model):
            fully_shard(unit, reshard_after_forward=frees, **policy)
        fully_shard(model, reshard_after_forward=False, **policy)
        # an answer calls the model many times, and its parameters outside the units must be whole for all of them
        register_fsdp_forward_method(model, "generate")

    def _precision(self) -> MixedPrecisionPolicy:
        dtypes = choose_dtypes(self.config.torch_dtype, trains_weights=self.config.trains_weights)
        if dtypes.compute == torch.float32:
            return MixedPrecisionPolicy()
        # half the traffic of the parameters; gradients are added in full precision, and inputs stay as they are, as
        # the weights of tokens are among them
        return MixedPrecisionPolicy(
            param_dtype=dtypes.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def _units(self, model: Any) -> list[nn.Module]:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        wanted = set(self.options.layers or base._no_split_modules or ())
        named = {name: m for name, m in base.named_modules() if type(m).__name__ in wanted}
        # a unit inside a unit comes first
        units = [named[name] for name in sorted(named, key=lambda name: -name.count("."))]
        if not units:
            listed = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
            longest = max(listed, key=len, default=nn.ModuleList())
            near = type(longest[0]).__name__ if len(longest) else "none"
            raise ConfigError(
                f"--fsdp finds no module of class {' or '.join(sorted(wanted)) or '(unknown)'} in this model; pass "
                f"--fsdp_config transformer_cls_names_to_wrap=CLASS (it has {near})"
            )
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        is_tied = any(id(parameter) in of_head for parameter in embedding.parameters())
        # an adapter on it may share its matrices with the head
        if isinstance(embedding, nn.Embedding) and not is_tied:
            units.append(embedding)
        return units

    def settle(self, model: Any) -> None:
        """Frees what is whole since a forward pass without a backward pass."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # -- wholes and parts ----------------------------------------------------------------------------------------

    def is_spread(self, parameter: Tensor) -> bool:
        """Whether it is a DTensor, as all parameters are by now."""
        return isinstance(parameter, DTensor)

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        """Returns the shape of the whole, which a DTensor says itself."""
        return parameter.shape

    def is_like(self, parameter: Tensor, value: Tensor) -> bool:  # noqa: ARG002
        """Whether a value of the optimizer is a DTensor too."""
        return isinstance(value, DTensor)

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:  # noqa: ARG002
        """Returns the whole of a DTensor."""
        assert isinstance(value, DTensor)
        found: Tensor = value.full_tensor()
        return found

    def part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Returns a DTensor that is spread as the parameter is."""
        assert isinstance(parameter, DTensor)
        return distribute_tensor(
            value.to(self.local(parameter).device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )

    def local(self, value: Tensor) -> Tensor:
        """Returns the shard of this rank."""
        return value.to_local() if isinstance(value, DTensor) else value

    @property
    def part_group(self) -> Any:
        """The ranks that share a copy of the model."""
        return self._mesh.get_group("shard")

    # -- the optimizer, where it stays in parts ------------------------------------------------------------------

    def save_optimizer(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Writes the optimizer whole, or the part of each rank of the first copy."""
        if not self.options.shards_state:
            super().save_optimizer(optimizer, folder)
        elif self.world.rank < self.shard_size:
            save_shard(optimizer, folder, self.world.rank, self.shard_size, self.local)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """Gives the optimizer its part."""
        if self.options.shards_state:
            load_shards(optimizer, folder, self._rows_of, self._of_rows)
        else:
            super().load_optimizer(optimizer, folder)

    def _rows_of(self, parameter: Tensor) -> tuple[int, int]:
        # as torch.chunk, which FSDP follows
        size = -(-parameter.shape[0] // self.shard_size)
        start = min(self._mesh.get_local_rank("shard") * size, parameter.shape[0])
        return start, min(start + size, parameter.shape[0])

    def _of_rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            rows.to(self.local(parameter).device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    @contextmanager
    def accumulating(self, model: Any) -> Iterator[None]:
        """Gradients are spread after each micro-batch, so none is ever whole; copies add theirs after the last."""
        if self.shard_size == self.world.size:
            yield
            return
        model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            model.set_requires_all_reduce(True)

    # -- what is checked -----------------------------------------------------------------------------------------

    def check(self, trainer: SftTrainer) -> None:
        """Holds what runs to what was asked for: each rank has its share of the parameters.

        Raises:
            SftcoreError: A parameter is whole, or this rank has more than its share.
        """
        super().check(trainer)
        whole = [name for name, p in trainer.model.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            raise SftcoreError(f"asked for {self.name}, but {whole[0]} is whole on each process")
        total = torch.tensor(self.own_bytes, device=trainer.args.device)
        dist.all_reduce(total, group=self.part_group)
        if int(total) != self.whole_bytes:
            raise SftcoreError(
                f"the shards of {self.shard_size} processes have {int(total):,} bytes; expected {self.whole_bytes:,}"
            )


def _check_dtypes(model: nn.Module) -> None:
    """Checks that gradients can be added in one dtype.

    Raises:
        ConfigError: The trained parameters are of several.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(
            f"--fsdp takes trained parameters of one dtype, and these are {' and '.join(names)}; pass --lora_dtype "
            "float32"
        )
