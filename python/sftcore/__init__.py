"""Fine-tune language models on instruction data: exact, seen, fast.

The names below are loaded when they are first used, so that `import sftcore` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftcore.config import InferConfig, MergeConfig, TrainConfig
    from sftcore.data import (
        BatchLoader,
        DatasetSource,
        Encoder,
        StreamLoader,
        __version__,
        register_dataset,
        resolve_sources,
    )
    from sftcore.export.merge import merge
    from sftcore.infer import infer
    from sftcore.train import train

__all__ = [
    "BatchLoader",
    "DatasetSource",
    "Encoder",
    "InferConfig",
    "MergeConfig",
    "StreamLoader",
    "TrainConfig",
    "__version__",
    "infer",
    "merge",
    "register_dataset",
    "resolve_sources",
    "train",
]

_HOMES = {
    "BatchLoader": "sftcore.data",
    "DatasetSource": "sftcore.data",
    "Encoder": "sftcore.data",
    "InferConfig": "sftcore.config",
    "MergeConfig": "sftcore.config",
    "StreamLoader": "sftcore.data",
    "TrainConfig": "sftcore.config",
    "__version__": "sftcore.data",
    "infer": "sftcore.infer",
    "merge": "sftcore.export",
    "register_dataset": "sftcore.data",
    "resolve_sources": "sftcore.data",
    "train": "sftcore.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sftcore' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    # a function of the same name as its package (`train`, `infer`) stands before the package
    globals()[name] = value
    return value
