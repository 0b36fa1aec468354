"""The name of a model to the folder of its tokenizer and chat template.

A name is a folder, a run folder (its best checkpoint, else its last), a checkpoint, a `.gguf` file, a short
name, or the id of a hub. Folders need numpy alone; of the others `sftcore.models` makes folders, imported
when it is first needed.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from sftcore.errors import ConfigError

_KINDS = (
    "expected a folder with tokenizer.json, a run folder or one of its checkpoints, a .gguf file, a short name "
    "(sftcore models list) or the id of a hub"
)


def checkpoint_of(folder: Path) -> Path:
    """Returns the checkpoint that a run folder stands for, and any other folder as it is."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    links = (folder / name for name in ("best", "last"))
    return next((link.resolve() for link in links if link.is_dir()), folder)


def tokenizer_folder(name: str | Path) -> Path:
    """Returns the folder with the tokenizer of a model.

    Raises:
        ConfigError: There is no such model, or what makes a folder of it is not installed.
        FileNotFoundError: There is no such `.gguf` file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return checkpoint_of(path)
    try:
        registry = importlib.import_module("sftcore.models.registry")
    except ImportError as error:
        raise ConfigError(
            f'"{name}" is no folder, and other names of models need packages that are not installed ({error.name}); '
            f'run pip install "sftcore[train]"; {_KINDS}'
        ) from error
    found: Path = registry.resolve_model(str(name), weights=False)
    return found
