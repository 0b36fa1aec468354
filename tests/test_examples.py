"""Each file of settings in examples/ is taken as it stands, by the engine that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import yaml

from sftcore.config import TrainConfig
from sftcore.config.schema import build
from sftcore.train.distributed import World, choose_engine

EXAMPLES = Path(__file__).parents[1] / "examples"
ENGINES = {
    "ddp": (2, "ddp"),
    "deepspeed": (2, "DeepSpeed ZeRO-2"),
    "device_map": (1, "device_map"),
    "fsdp": (2, "fsdp (full_shard)"),
    "pipeline": (2, "pipeline"),
    "quickstart": (1, "ddp"),
    "tensor_parallel": (3, "tensor parallel (3)"),
    "ulysses": (4, "DeepSpeed ZeRO-3, sequences in 4 parts"),
}


def test_every_engine_has_an_example() -> None:
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/config.yaml")) == sorted(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_an_example_runs_the_engine_that_it_shows(name: str) -> None:
    if name in ("deepspeed", "ulysses"):
        pytest.importorskip("deepspeed")
    path = EXAMPLES / name / "config.yaml"
    size, engine = ENGINES[name]
    config = build(
        TrainConfig, yaml.safe_load(path.read_text(encoding="utf-8")), origin=f"examples/{name}"
    )
    shared = config.model_parallel_size
    world = World(size=size, local_size=size, model_parallel_size=shared)
    assert choose_engine(config, world).name == engine
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert size == 1 or f"NPROC_PER_NODE={size} sftcore train --config examples/{name}/" in readme
