"""The run folder: its name, and what is written into it beside the weights."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.distributed.world import World

# what decides the numbers of a run
_PACKAGES = (
    "sftcore",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "flash-attn",
    "liger-kernel",
    "triton",
    "deepspeed",
    "gguf",
    "matplotlib",
    "rich",
    "tensorboard",
    "wandb",
    "mlflow",
    "swanlab",
    "trackio",
)
ENVIRONMENT_FILE = "environment.json"
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF")


def make_run_folder(config: TrainConfig) -> Path:
    """Makes `output/MODEL/vN-TIME`, or takes `output` itself with `add_version: false`.

    Raises:
        ConfigError: Something that is no folder has that name.
    """
    parent = folder_of_runs(config)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"--output_dir {config.output_dir} cannot be made: {str(error.strerror).lower()}; name another "
            "folder"
        ) from error
    if not config.add_version:
        return parent
    versions = (re.match(r"v(\d+)-", folder.name) for folder in parent.iterdir())
    number = 1 + max((int(version[1]) for version in versions if version), default=-1)
    while True:
        folder = parent / f"v{number}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def folder_of_runs(config: TrainConfig) -> Path:
    """Returns the folder that holds the runs of a model; with `add_version: false` it is the run itself."""
    output = Path(config.output_dir)
    if not config.add_version:
        return output
    # a model given as . or .. has a name too, and a link keeps its own
    name = Path(os.path.abspath(Path(config.model).expanduser())).name  # noqa: PTH100
    return output / re.sub(r"[^\w.-]+", "-", name)


def write_args(folder: Path, config: TrainConfig) -> None:
    """Writes `args.yaml`, which `--config` takes back."""
    text = yaml.safe_dump(config.to_dict(), allow_unicode=True, sort_keys=False)
    (folder / "args.yaml").write_text(text, encoding="utf-8")


def write_environment(folder: Path, world: World) -> None:
    """Writes `environment.json`: what a run ran with and where, for reports of bugs and for running it again."""
    start = {"run_id": world.run_id, "restarts": world.restarts}
    text = json.dumps({**environment(), **start}, ensure_ascii=False, indent=2)
    (folder / ENVIRONMENT_FILE).write_text(text, encoding="utf-8")


def is_of_start_before(folder: Path, world: World) -> bool:
    """Whether a run folder was written by this very run, before its processes were started anew."""
    try:
        found = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or not world.run_id or found.get("run_id") != world.run_id:
        return False
    return int(found.get("restarts", 0)) < world.restarts


def environment() -> dict[str, Any]:
    """Returns the versions of packages, the devices and the folder of this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "devices": [
            {
                "name": torch.cuda.get_device_name(index),
                "gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            }
            for index in range(torch.cuda.device_count())
        ],
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        # relative paths of args.yaml begin here
        "folder": str(Path.cwd()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_args(folder: Path) -> dict[str, Any]:
    """Returns the settings of the run that wrote a checkpoint; empty where it has none."""
    path = folder / "args.yaml"
    if not path.is_file():
        return {}
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings if isinstance(settings, dict) else {}
