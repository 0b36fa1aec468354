"""How processes and devices share a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftcore.config.fsdp import FsdpOptions, read_fsdp_options
from sftcore.config.pairs import read_pairs
from sftcore.config.pipeline import check_pipeline
from sftcore.config.ranges import check_effects, check_least
from sftcore.config.zero import read_deepspeed
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Devices. How processes and devices share a run; NPROC_PER_NODE=2 sftcore train ... starts two processes."""

    deepspeed: str | None = None
    """DeepSpeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, or a JSON file of its settings."""
    fsdp: Literal["fsdp2", "full_shard", "shard_grad_op", "hybrid_shard"] | None = None
    """PyTorch's FSDP2, which shards parameters, gradients and optimizer: fsdp2 (the same as full_shard), shard_grad_op
    (parameters stay whole between forward and backward pass), or hybrid_shard (whole copies, one a node)."""
    fsdp_config: str = "{}"
    """More of FSDP, as '{"cpu_offload": true}' or cpu_offload=true; the names are those of accelerate's plugin, and
    shard_size, the processes that share a copy of hybrid_shard (docs/distributed/fsdp.md)."""
    tensor_parallel_size: int = 1
    """Processes that share each layer, by the tensor-parallel plan of the model."""
    pipeline_parallel_size: int = 1
    """Processes that have a part of the layers each."""
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """The order of a pipeline: 1f1b keeps fewer activations, gpipe runs all forward passes first."""
    sequence_parallel_size: int = 1
    """Processes that share each sequence (Ulysses, Jacobs et al. 2023, arXiv:2309.14509)."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Spreads the layers of a model over the devices of one process, which take turns."""
    max_restarts: int = 0
    """How often the launcher starts all processes anew after a failure; they go on from the last checkpoint."""

    def _check_parallel(self) -> None:
        check_least(
            self,
            1,
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "sequence_parallel_size",
        )
        check_least(self, 0, "max_restarts")
        needed = {
            "fsdp_config": (self.fsdp is not None, "--fsdp"),
            "pipeline_schedule": (
                self.pipeline_parallel_size > 1,
                "--pipeline_parallel_size 2 or more",
            ),
        }
        check_effects(self, ParallelConfig, needed)
        _ = self.fsdp_options
        if self.deepspeed is not None:
            read_deepspeed(self.deepspeed)
        engines = self.engines
        # Ulysses runs on top of ZeRO
        together = {"--deepspeed", "--sequence_parallel_size"}
        if len(engines) > 1 and not set(engines) <= together:
            raise ConfigError(
                f"{' and '.join(engines)} exclude each other; --deepspeed goes with --sequence_parallel_size, and each "
                "of the others with plain data parallelism over the rest of the processes"
            )
        check_pipeline(self)

    @property
    def engines(self) -> list[str]:
        """The flags that choose an engine; none is data parallelism with whole models."""
        chosen = {
            "--deepspeed": self.deepspeed is not None,
            "--fsdp": self.fsdp is not None,
            "--tensor_parallel_size": self.tensor_parallel_size > 1,
            "--pipeline_parallel_size": self.pipeline_parallel_size > 1,
            "--sequence_parallel_size": self.sequence_parallel_size > 1,
            "--device_map": self.device_map is not None,
        }
        return [flag for flag, is_chosen in chosen.items() if is_chosen]

    @property
    def model_parallel_size(self) -> int:
        """The processes that work on the same examples."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.sequence_parallel_size

    @property
    def fsdp_options(self) -> FsdpOptions:
        """`fsdp` and `fsdp_config` as what FSDP is told.

        Raises:
            ConfigError: `fsdp_config` is neither a JSON object nor pairs, or one of them is wrong.
        """
        given = read_pairs("fsdp_config", self.fsdp_config, '{"cpu_offload": true}')
        return read_fsdp_options(self.fsdp or "fsdp2", given)
