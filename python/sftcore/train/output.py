"""The run folder: its name, and what is written into it beside the weights."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import yaml

from sftcore.config import TrainConfig


def make_run_folder(config: TrainConfig) -> Path:
    """Makes `output/MODEL/vN-TIME`, or takes `output` itself with `add_version: false`."""
    parent = folder_of_runs(config)
    if not config.add_version:
        parent.mkdir(parents=True, exist_ok=True)
        return parent
    parent.mkdir(parents=True, exist_ok=True)
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
    return (
        output / re.sub(r"[^\w.-]+", "-", Path(config.model).name) if config.add_version else output
    )


def write_args(folder: Path, config: TrainConfig) -> None:
    """Writes `args.yaml`, which `--config` takes back."""
    text = yaml.safe_dump(config.to_dict(), allow_unicode=True, sort_keys=False)
    (folder / "args.yaml").write_text(text, encoding="utf-8")


def read_args(folder: Path) -> dict[str, Any]:
    """Returns the settings of the run that wrote a checkpoint; empty where it has none."""
    path = folder / "args.yaml"
    if not path.is_file():
        return {}
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    return settings if isinstance(settings, dict) else {}
