"""From the settings to the engine that runs them."""

from __future__ import annotations

from sftcore.config import TrainConfig
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.world import World


def choose_engine(config: TrainConfig, world: World) -> Engine:
    """Returns the engine that the settings name.

    Raises:
        ConfigError: It cannot run with the other settings, on this machine, or with these processes.
    """
    if config.sequence_parallel_size > 1:
        from sftcore.train.distributed.ulysses import sequence_engine

        return sequence_engine(config, world)
    if config.deepspeed is not None:
        from sftcore.train.distributed.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, world)
    return Engine(config, world)
