"""The settings of each command: declared once, the same in YAML, on the command line and in code."""

from __future__ import annotations

from sftcore.config.commands import InferConfig, MergeConfig
from sftcore.config.schema import Setting, build, read_yaml, settings_of
from sftcore.config.train import TrainConfig

__all__ = [
    "InferConfig",
    "MergeConfig",
    "Setting",
    "TrainConfig",
    "build",
    "read_yaml",
    "settings_of",
]
