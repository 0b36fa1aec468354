"""The processes of a run, as torchrun names them in the environment.

Ranks that share the layers or the sequences of a model (tensor, pipeline and sequence parallelism) lie side by
side and work on the same examples; the data is split among the groups of them, never within one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where this process stands among those of the run.

    Attributes:
        rank: Of this process, from 0.
        size: All processes.
        local_rank: Of this process on its node.
        local_size: The processes of this node.
        model_parallel_size: The processes that work on the same examples.
        run_id: Names the start of the run on all nodes, also after a restart; empty without torchrun.
        restarts: How often torchrun has started the processes anew.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    model_parallel_size: int = 1
    run_id: str = ""
    restarts: int = 0

    @property
    def data_rank(self) -> int:
        """The share of each global batch that this process works on."""
        return self.rank // self.model_parallel_size

    @property
    def data_size(self) -> int:
        """The shares of each global batch."""
        return self.size // self.model_parallel_size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def is_launched(self) -> bool:
        """Whether torchrun, or what sets its variables, has started this process."""
        return "WORLD_SIZE" in os.environ


def read_world(config: TrainConfig) -> World:
    """Returns the world that the environment and the settings describe.

    Raises:
        ConfigError: The variables of torchrun are incomplete, or the processes cannot be grouped as the settings ask.
    """
    values = {name: os.environ.get(name) for name in _NAMES}
    if values["WORLD_SIZE"] is None:
        values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, default in (("LOCAL_RANK", values["RANK"]), ("LOCAL_WORLD_SIZE", "1")):
        # launchers of other projects leave these out on one node
        values[name] = values[name] or default
    try:
        rank, size, local_rank, local_size = (int(values[name] or "") for name in _NAMES)
    except ValueError as error:
        found = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ConfigError(
            f"the environment names the processes incompletely ({found}); start them with NPROC_PER_NODE=2 sftcore "
            "train ... or torchrun"
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} is out of range: expected 0 to {size - 1}")
    shared = config.model_parallel_size
    if size % shared:
        flags = " and ".join(flag for flag in config.engines if flag.endswith("_size"))
        raise ConfigError(
            f"{size} processes cannot be grouped by {shared}, as {flags} asks; start a multiple of {shared} "
            f"(NPROC_PER_NODE={shared} sftcore train ...)"
        )
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        model_parallel_size=shared,
        run_id=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
