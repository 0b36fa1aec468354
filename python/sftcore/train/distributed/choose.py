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
    if config.pipeline_parallel_size > 1:
        from sftcore.train.distributed.pipeline import PipelineEngine  # not needed otherwise

        return PipelineEngine(config, world)
    return Engine(config, world)
