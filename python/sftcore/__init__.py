"""Fine-tune language models on instruction data: exact, seen, fast.

The names below are loaded when they are first used, so that `import sftcore` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftcore.config import InferConfig, MergeConfig, TrainConfig
    from sftcore.data import BatchLoader, Encoder, __version__
    from sftcore.export.merge import merge
    from sftcore.infer import infer
    from sftcore.train import train

__all__ = [
    "BatchLoader",
    "Encoder",
    "InferConfig",
    "MergeConfig",
    "TrainConfig",
    "__version__",
    "infer",
    "merge",
    "train",
]

_HOMES = {
    "BatchLoader": "sftcore.data",
    "Encoder": "sftcore.data",
    "InferConfig": "sftcore.config",
    "MergeConfig": "sftcore.config",
    "TrainConfig": "sftcore.config",
    "__version__": "sftcore.data",
    "infer": "sftcore.infer",
    "merge": "sftcore.export",
    "train": "sftcore.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sftcore' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    # a function of the same name as its package (`train`, `infer`) stands before the package
    globals()[name] = value
    return value
