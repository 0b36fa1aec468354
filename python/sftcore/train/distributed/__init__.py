"""Many processes: who they are, and the engine by which they share a run."""

from sftcore.train.distributed.choose import choose_engine
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.world import World, read_world

__all__ = ["Engine", "World", "choose_engine", "read_world"]
