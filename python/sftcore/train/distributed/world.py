"""The processes of a run, as torchrun names them in the environment.

Ranks that share the layers or the sequences of a model (tensor, pipeline and sequence parallelism) lie side by
side and work on the same examples; the data is split among the groups of them, never within one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# of srun and of mpirun, which name the processes in ways of their own
_OTHER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where this process stands among those of the run.

    Attributes:
        rank: Of this process, from 0.
        size: All processes.
        local_rank: Of this process on its node.
        local_size: The processes of this node.
        model_parallel_size: The processes that work on the same examples.
        run_id: Names the life of the launcher of this node, also after a restart; empty where it is not known.
        restarts: How often the launcher has started the processes anew.
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
        _check_single()
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
    # torchrun does not count the starts that follow a change of the nodes
    restarts = os.environ.get("SFTCORE_RESTARTS") or os.environ.get(
        "TORCHELASTIC_RESTART_COUNT", "0"
    )
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        model_parallel_size=shared,
        run_id=_run_id(),
        restarts=int(restarts),
    )


def _run_id() -> str:
    """Returns what the launcher calls its life; of torchrun, whose own name may be that of other runs, the process."""
    given = os.environ.get("SFTCORE_LAUNCH_ID")
    if given or "TORCHELASTIC_RUN_ID" not in os.environ:
        return given or ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # the name in brackets may hold anything; the 22nd field is when the process began, in ticks since the boot
        after_name = (
            Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        )
    except OSError:
        return ""  # not Linux
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()} {after_name.split()[19]} {boot}"


def _check_single() -> None:
    """Keeps the processes of a launcher that does not say so from being as many runs in one folder.

    Raises:
        ConfigError: The environment is that of one of several processes.
    """
    sizes = {name: os.environ.get(name, "1") for name in _OTHER_SIZES}
    many = next((f"{name}={size}" for name, size in sizes.items() if size != "1"), None)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        many = "accelerate launch with --num_processes 2 or more, which starts one process where there is no GPU"
    if many:
        raise ConfigError(
            f"this process does not know the others ({many}): each would be a run of its own; start one launcher a "
            "node (NPROC_PER_NODE=2 sftcore train ..., with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on many "
            "nodes), or torchrun -m sftcore.cli train ...; set RANK=0 WORLD_SIZE=1 where that is what you want"
        )
