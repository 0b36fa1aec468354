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
    # an engine is imported where it is asked for: what it builds on may not be installed
    if config.pipeline_parallel_size > 1:
        from sftcore.train.distributed.pipeline import PipelineEngine

        return PipelineEngine(config, world)
    if config.fsdp is not None:
        from sftcore.train.distributed.fsdp import FsdpEngine

        return FsdpEngine(config, world)
    if config.tensor_parallel_size > 1:
        from sftcore.train.distributed.tensor_parallel import TensorParallelEngine

        return TensorParallelEngine(config, world)
    if config.device_map is not None:
        from sftcore.train.distributed.device_map import DeviceMapEngine

        return DeviceMapEngine(config, world)
    if config.sequence_parallel_size > 1:
        from sftcore.train.distributed.ulysses import sequence_engine

        return sequence_engine(config, world)
    if config.deepspeed is not None:
        from sftcore.train.distributed.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, world)
    return Engine(config, world)
