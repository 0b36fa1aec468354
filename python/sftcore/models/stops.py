"""The tokens at which a model stops: read from its files, and written beside what was trained.

`generation_config.json` is what Transformers, vLLM and others read; where a model has none, `config.json` says it. What
is written keeps every field of the model's own file as it stands, also where Transformers would find it inconsistent,
and has the tokens that were trained to end an answer behind the model's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sftcore.errors import ConfigError

GENERATION_FILE = "generation_config.json"
_CONFIG_FILE = "config.json"
_KEY = "eos_token_id"
# what generation needs of a configuration without such a file
_OF_CONFIG = ("bos_token_id", _KEY, "pad_token_id")


def stops_of(folder: Path) -> list[int]:
    """Returns the ids that the generation_config.json and the config.json of a folder name, those that are there.

    Raises:
        ConfigError: A file is no JSON object, or names something else than ids.
    """
    found: list[int] = []
    for name in (GENERATION_FILE, _CONFIG_FILE):
        values = _read(folder / name)
        found += _ids(folder / name, values)
        if isinstance(text := values.get("text_config"), dict):
            found += _ids(folder / name, text)
    return list(dict.fromkeys(found))


def write_generation_config(folder: Path, *, home: Path, trained: Sequence[int]) -> None:
    """Writes `generation_config.json` with the tokens that a model was trained to stop at.

    Args:
        folder: Of the checkpoint or the model.
        home: A folder with the model's own file, or with its config.json.
        trained: The ids; they go behind the model's own.

    Raises:
        ConfigError: The model's own file is damaged.
    """
    path = home / GENERATION_FILE
    if path.is_file():
        values = _read(path)
    else:
        path = home / _CONFIG_FILE
        config = _read(path)
        text = config.get("text_config")
        config = {**(text if isinstance(text, dict) else {}), **config}
        values = {name: config[name] for name in _OF_CONFIG if config.get(name) is not None}
    # said of a file that follows config.json, and older versions of Transformers would make it anew from there
    values.pop("_from_model_config", None)
    stops = _merged(_ids(path, values), trained)
    if stops:
        is_list = len(stops) > 1 or isinstance(values.get(_KEY), list)
        values[_KEY] = stops if is_list else stops[0]
    text_of_file = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    (folder / GENERATION_FILE).write_text(text_of_file, encoding="utf-8")


def copy_stops(source: Path, target: Path) -> None:
    """Copies the files that `stops_of` reads."""
    for name in (GENERATION_FILE, _CONFIG_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _merged(own: Iterable[int], more: Iterable[int]) -> list[int]:
    return list(dict.fromkeys([*own, *more]))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}; copy or download it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _ids(path: Path, values: dict[str, Any]) -> list[int]:
    value = values.get(_KEY)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ConfigError(f"{path}: {_KEY} is {value!r}; expected an id or a list of ids")
    return ids
