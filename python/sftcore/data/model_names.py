"""The name of a model to the folder of its tokenizer and chat template.

A name is a folder, a run folder (its best checkpoint, else its last), a checkpoint, a `.gguf` file, a short
name, or the id of a hub. Folders need numpy alone; of the others `sftcore.models` makes folders, imported
when it is first needed.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from sftcore.errors import ConfigError

_KINDS = (
    "expected a folder with tokenizer.json, a run folder or one of its checkpoints, a .gguf file, a short name "
    "(smollm2-135m) or the id of a hub"
)


def checkpoint_of(folder: Path) -> Path:
    """Returns the checkpoint that a run folder stands for, and any other folder as it is."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    links = (folder / name for name in ("best", "last"))
    return next((link.resolve() for link in links if link.is_dir()), folder)


def near_folders(name: str) -> str:
    """Returns `; did you mean the folder X?` with the folders that a misspelt path may mean, or nothing.

    Each part of the path that is not there is taken for those beside it that are spelt nearly so, three at most.
    """
    path = Path(name).expanduser()
    if path.exists():
        return ""
    places = [Path(path.anchor)]
    for part in path.relative_to(path.anchor).parts:
        places = [found for place in places for found in _nearest(place, part)][:3]
    prefix = "./" if name.startswith("./") else ""
    shown = " or ".join(f"{prefix}{place}" for place in places)
    return f"; did you mean the folder {shown}?" if shown else ""


def _nearest(place: Path, name: str) -> list[Path]:
    """The folder of this name in a place, else those of a name that is nearly this one."""
    if (place / name).is_dir():
        return [place / name]
    try:
        beside = sorted(found.name for found in place.iterdir() if found.is_dir())
    except OSError:  # it may not be looked into
        return []
    return [place / near for near in difflib.get_close_matches(name, beside, n=3, cutoff=0.6)]


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
            f'run pip install "sftcore[train]"; {_KINDS}{near_folders(str(name))}'
        ) from error
    found: Path = registry.resolve_model(str(name), weights=False)
    return found
