"""How the ranks of a run share its work: what an engine is asked for, and the plain one.

In comes a configuration and the world; out go the arguments by which Transformers and accelerate run the engine, the
numbers that are summed over ranks, and the proof that what runs is what was asked for, as both libraries fall back to
something else without a word. The plain engine has the whole model on each rank and averages gradients (DDP).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sftcore.config import TrainConfig
from sftcore.errors import PeerError, SftcoreError, StoppedError
from sftcore.program import end_abruptly
from sftcore.train.distributed.world import World
from sftcore.train.inputs import InputKind
from sftcore.train.method import LossMethod, choose_loss
from sftcore.train.speed import peak_memory

if TYPE_CHECKING:
    from sftcore.train.method import LossMethod
    from sftcore.train.trainer import SftTrainer


def _leave_group() -> None:
    """Tells the other ranks that this one ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """Data parallelism: each rank has the whole model and a share of each global batch.

    Attributes:
        config: The settings of the run.
        world: The processes.
        data_group: The ranks that have the same place in their group of `model_parallel_size` as this one, one for
            each share of the data; None stands for all.
    """

    name = "ddp"
    # how a checkpoint keeps the optimizer: `plain` loads on any number of processes
    state_format = "plain"
    # whether it goes on with another number of processes
    is_elastic = True
    # whether a rank can run the model without the others
    runs_alone = True
    # whether ranks with other examples take part in each forward pass
    shares_weights = False
    # what accelerate calls it; None where no accelerator state shows it
    distributed_types: tuple[str, ...] = ("MULTI_CPU", "MULTI_GPU")
    # whether it keeps float32 weights beside those of the model
    has_master_weights = False
    # whether it scales float16 losses by itself, and leaves out the steps that overflow
    scales_loss = False
    # whether the head may be called but once a forward pass, as each call gathers its weights from all ranks
    calls_head_once = False

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.data_group: Any = None
        self._opened = False

    def __enter__(self) -> Engine:  # noqa: PYI034
        """Takes this rank's device and joins the other ranks."""
        if torch.cuda.is_available():
            torch.cuda.set_device(self.world.local_rank)
        if self.is_distributed:
            end_abruptly()
        if self.is_distributed and not dist.is_initialized():
            self._opened = True
            on_gpu = torch.cuda.is_available()
            atexit.register(_leave_group)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                timeout=datetime.timedelta(seconds=self.timeout),
                device_id=torch.device("cuda", self.world.local_rank) if on_gpu else None,
            )
        if self.world.model_parallel_size > 1:
            self.data_group = self._make_data_group()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the other ranks; the group stays, as a later run of the same processes takes it again."""
        if self._opened and (error is None or isinstance(error, StoppedError)):
            dist.barrier()  # none leaves while another still writes

    @property
    def is_distributed(self) -> bool:
        """Whether a process group is needed."""
        return self.world.size > 1

    @property
    def timeout(self) -> float:
        """Seconds after which a rank that waits for another one gives up."""
        return float(self.config.trainer_arguments.get("ddp_timeout", 1800))

    def _make_data_group(self) -> Any:
        shared, found = self.world.model_parallel_size, None
        for place in range(shared):
            ranks = list(range(place, self.world.size, shared))
            group = dist.new_group(ranks)  # every rank takes part in making every group
            if self.world.rank in ranks:
                found = group
        return found

    # -- what Transformers is told -------------------------------------------------------------------------------

    def meet(self, settings: Any) -> None:
        """Looks at the configuration of the model that will be loaded.

        Raises:
            ConfigError: The engine cannot run such a model.
        """

    def check_new_tokens(self) -> None:
        """Looks at whether a model can be given rows for `--new_special_tokens`.

        Raises:
            ConfigError: The engine cannot train them.
        """

    def load_arguments(self) -> dict[str, Any]:
        """More arguments of `from_pretrained`."""
        return {}

    def place(self, model: Any) -> Any:
        """Puts a model that was just loaded on the device of this rank, where it is to be there as a whole."""
        if torch.cuda.is_available() and self.config.weight_bits is None:
            model.to(torch.device("cuda", self.world.local_rank))
        return model

    def runnable(self, model: Any) -> Any:
        """Returns what gives the logits of the whole model, for checks before training."""
        return model

    def skeleton(self, model: Any) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002
        """A block in which the model has all its modules, though perhaps not their weights."""
        return contextlib.nullcontext()

    def choose_loss(self, model: Any, kind: InputKind) -> LossMethod:
        """Returns how the losses of the model with its tuner are computed.

        Raises:
            ConfigError: As `--loss_impl` asks, they cannot be.
        """
        return choose_loss(self.config, model, kind, calls_head_once=self.calls_head_once)

    def share(self, model: Any) -> None:
        """Spreads a model that has its tuner over the ranks, in place, where that is not left to the Trainer."""

    def training_arguments(self) -> dict[str, Any]:
        """More arguments of `TrainingArguments`."""
        return {}

    def trainer_class(self) -> type[SftTrainer]:
        """The Trainer that runs this engine."""
        from sftcore.train.trainer import SftTrainer  # the trainer takes an engine

        return SftTrainer

    def check(self, trainer: SftTrainer) -> None:
        """Holds what runs to what was asked for.

        Raises:
            SftcoreError: Transformers or accelerate runs something else.
        """
        # torch would copy a model to each GPU that the process sees
        trainer.args._n_gpu = min(1, trainer.args.n_gpu)
        if trainer.args.world_size != self.world.size:
            raise SftcoreError(
                f"asked for {self.world.size} processes, but Transformers runs {trainer.args.world_size}"
            )
        kind = trainer.accelerator.distributed_type.value
        if self.is_distributed and kind not in self.distributed_types:
            raise SftcoreError(f"asked for {self.name}, but accelerate runs {kind}")

    def describe(self) -> str | None:
        """A line for people on how the ranks share the run; None where there is but one."""
        num_gpus = torch.cuda.device_count()
        if self.world.size == 1 and not self.config.engines:
            if num_gpus < 2 or self.config.trainer_arguments.get("use_cpu"):
                return None
            return (
                f"warning: {num_gpus} GPUs are there, and one process takes one of them; NPROC_PER_NODE={num_gpus} "
                "sftcore train ... takes all, and CUDA_VISIBLE_DEVICES=0 hides the others"
            )
        return f"{self.world.size} processes: {self.name}"

    # -- what is counted over ranks ------------------------------------------------------------------------------

    def global_tokens(self, num_tokens: Any) -> Any:
        """From trained tokens summed over all ranks to those of the global batch."""
        return num_tokens // self.world.model_parallel_size

    @property
    def gradient_ranks(self) -> int:
        """The number of ranks whose gradients the engine averages."""
        return self.world.data_size

    def reduce(self, values: Tensor, how: str = "sum") -> Tensor:
        """Returns the sum or the mean of a tensor over the shares of the data; the argument stays as it is."""
        values = values.clone()
        if self.world.data_size > 1:
            dist.all_reduce(values, group=self.data_group)
        return values / self.world.data_size if how == "mean" else values

    def gather(self, values: Tensor) -> Tensor:
        """Joins a tensor of each share of the data along its first dimension."""
        if self.world.data_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world.data_size)]
        dist.all_gather(parts, values.contiguous(), group=self.data_group)
        return torch.cat(parts)

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Joins lists of small picklable objects of each share of the data."""
        if self.world.data_size == 1:
            return values
        parts: list[Any] = [None] * self.world.data_size
        dist.all_gather_object(parts, values, group=self.data_group)
        return [value for part in parts for value in part]

    def peak_memory(self) -> float:
        """Returns the most memory that a process which works on the same examples as this one had, in bytes."""
        peak = float(peak_memory())
        if self.world.model_parallel_size == 1:
            return peak  # the ranks that share the data compare theirs
        on_gpu = torch.cuda.is_available()
        held = torch.tensor([peak], dtype=torch.float64, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return float(held)

    def from_first(self, call: Callable[[], Any]) -> Any:
        """Calls a function on rank 0 and returns its picklable result on every rank.

        Raises:
            PeerError: It raised an error on rank 0, where that error goes on.
        """
        if self.world.size == 1:
            return call()
        held: list[Any] = [None, None]
        try:
            if self.world.is_first:
                held[0] = call()
        except BaseException as error:
            held[1] = f"{type(error).__name__}: {error}"
            raise
        finally:
            # the others wait for it, whatever became of it
            dist.broadcast_object_list(held, src=0)
        value, fault = held
        if fault is not None:
            raise PeerError(f"rank {self.world.rank}: rank 0 ended the run ({fault})")
        return value
