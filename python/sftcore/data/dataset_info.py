"""A user's own file of data sets to entries of the registry.

TOML, JSON or YAML, in one of three forms, told apart by their keys: our own (as `datasets/registry.toml`
is written), LLaMA-Factory's `dataset_info.json`, and ms-swift's list of data sets. Paths in it are
relative to the file. An unknown key is an error; what training cannot use is said in a note.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sftcore.config.schema import did_you_mean
from sftcore.data.registry import DatasetEntry, check_columns, make_entry
from sftcore.data.rows import unique_keys
from sftcore.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FACTORY_KEYS = (
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
)
# keys that only LLaMA-Factory's form has
_FACTORY_OWN = {*_FACTORY_KEYS} - {"subset", "split", "columns", "tags", "folder"}
_FACTORY_COLUMNS = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "images",
    "videos",
    "audios",
    "chosen",
    "rejected",
    "kto_tag",
)
# the values its tags have where none are given
_FACTORY_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
# what a message with "role" and "content" may be called without a tag that says so
_KNOWN_ROLES = {
    "role_tag": {"role"},
    "content_tag": {"content"},
    "user_tag": {"user", "human"},
    "assistant_tag": {"assistant", "gpt", "bot"},
    "observation_tag": {"observation", "tool", "tool_response"},
    "function_tag": {"function_call", "tool_call"},
    "system_tag": {"system", "developer"},
}
_SWIFT_KEYS = (
    "dataset_name",
    "ms_dataset_id",
    "hf_dataset_id",
    "dataset_path",
    "subsets",
    "split",
    "columns",
    "tags",
    "help",
    "huge_dataset",
)


def read_dataset_info(path: str | Path) -> list[DatasetEntry]:
    """Reads a file of data sets.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: It is not TOML, JSON or YAML, or an entry in it is wrong.
    """
    path = Path(path).expanduser()
    content = _parse(path)
    if isinstance(content, list):
        entries = [_swift_entry(path, number, value) for number, value in enumerate(content)]
    elif isinstance(content, dict):
        entries = [_named_entry(path, str(name), value) for name, value in content.items()]
    else:
        raise ConfigError(
            f"{path}: expected data sets by name, or a list of them, found {type(content).__name__}"
        )
    seen: dict[str, str] = {}
    for entry in entries:
        for name in (entry.name, *entry.aliases):
            if name in seen:
                raise ConfigError(f'{path}: the name "{name}" stands twice; rename one of them')
            seen[name] = entry.name
    return entries


def _parse(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of data sets; check --dataset_info")
    kinds = {".toml": "TOML", ".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: expected a file of data sets as .toml, .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if kind == "TOML":
            return tomllib.loads(text)
        if kind == "JSON":
            return json.loads(text, object_pairs_hook=unique_keys)
        return _parse_yaml(path, text)
    except (ValueError, RecursionError) as error:  # the errors of json, tomllib and of the decoding
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not {kind}: {error}") from error


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        import yaml  # only this form needs it
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{path}: YAML needs pyyaml, which is not installed; run pip install "sftcore[hub]" '
            "or write the file as TOML or JSON"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error


def _named_entry(path: Path, name: str, value: Any) -> DatasetEntry:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f'{path}: data set "{name}" is {value!r}; expected what it is by key, like '
            '{"files": "rows.jsonl"}'
        )
    if _FACTORY_OWN & set(value):
        return _factory_entry(path, name, value)
    return make_entry(name, value, origin=str(path), folder=path.parent)


def _factory_entry(path: Path, name: str, value: Mapping[str, Any]) -> DatasetEntry:
    place = f'{path}: data set "{name}"'
    _check_keys(place, value, _FACTORY_KEYS)
    hubs = {"hf_id": value.get("hf_hub_url"), "ms_id": value.get("ms_hub_url")}
    for key in ("script_url", "cloud_file_name", "om_hub_url"):
        if key in value and not any(hubs.values()) and "file_name" not in value:
            raise ConfigError(
                f"{place}: {key} {value[key]!r} cannot be read; fetch its files and name them as file_name"
            )
    columns, notes = _factory_columns(place, value)
    entry = {
        **hubs,
        # with a hub beside it, the file is not read there either
        "files": None if any(hubs.values()) else value.get("file_name"),
        "subset": value.get("subset"),
        "split": value.get("split"),
        "hub_folder": value.get("folder"),
        "sample": value.get("num_samples"),
        "columns": columns,
        "notes": notes,
    }
    return make_entry(name, entry, origin=str(path), folder=path.parent)


def _factory_columns(place: str, value: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    formatting = value.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(
            f"{place}: formatting is {formatting!r}; expected alpaca, sharegpt or openai"
        )
    given = check_columns(place, "columns", value.get("columns", {}))
    _check_keys(f"{place}: columns", given, _FACTORY_COLUMNS)
    tags = check_columns(place, "tags", value.get("tags", {}))
    _check_keys(f"{place}: tags", tags, _FACTORY_TAGS)
    columns: dict[str, Any]
    if formatting == "alpaca":
        columns = _alpaca_columns(given)
    else:
        columns = _message_columns(given, tags, is_openai=formatting == "openai")
    for role in ("system", "tools"):
        if role in given and given[role] != role:
            columns[given[role]] = role
    notes = []
    if value.get("ranking") or "chosen" in given or "rejected" in given:
        notes.append(f"{place} holds preference pairs; SFT needs rows with one answer each")
    if "kto_tag" in given:
        notes.append(f'{place}: "{given["kto_tag"]}" (kto_tag) is not used')
    media = [role for role in ("images", "videos", "audios") if role in given]
    if media:
        notes.append(f"{place}: {', '.join(media)} are not read; the texts alone are trained")
    return columns, notes


def _alpaca_columns(given: Mapping[str, str]) -> dict[str, Any]:
    if not given:
        return {}
    prompt, query, response = (given.get(role) for role in ("prompt", "query", "response"))
    targets: dict[str, str | None]
    if prompt and not query and not response and "chosen" not in given:
        targets = {"text": prompt}  # one column alone is a document
    elif prompt and query:
        targets = {"instruction": prompt, "input": query, "output": response}
    else:
        targets = {"query": prompt or query, "response": response}
    targets["history"] = given.get("history")
    return {column: key for key, column in targets.items() if column and column != key}


def _message_columns(
    given: Mapping[str, str], tags: Mapping[str, str], *, is_openai: bool
) -> dict[str, Any]:
    defaults = dict(_FACTORY_TAGS)
    if is_openai:
        defaults |= {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
        defaults |= {"assistant_tag": "assistant", "observation_tag": "tool"}
    said = {**defaults, **tags}
    column = given.get("messages", "messages" if is_openai else "conversations")
    if all(said[tag] in known for tag, known in _KNOWN_ROLES.items()):
        return {} if column == "messages" else {column: "messages"}
    differing = {tag: text for tag, text in said.items() if text != _FACTORY_TAGS[tag]}
    columns: dict[str, Any] = {} if column == "conversations" else {column: "conversations"}
    return {**columns, "tags": differing} if differing else columns


def _swift_entry(path: Path, number: int, value: Any) -> DatasetEntry:
    place = f"{path}: [{number}]"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place} is {value!r}; expected a data set by key, like ms_dataset_id")
    _check_keys(place, value, _SWIFT_KEYS)
    ids = [value.get(key) for key in ("ms_dataset_id", "hf_dataset_id")]
    name = value.get("dataset_name") or next((one for one in ids if one), None)
    name = name or value.get("dataset_path")
    if not isinstance(name, str):
        raise ConfigError(
            f"{place} has no name; expected dataset_name, dataset_path, ms_dataset_id or hf_dataset_id"
        )
    subsets = value.get("subsets", [])
    splits = value.get("split", ["train"])
    splits = splits if isinstance(splits, list) else [splits]
    if not isinstance(subsets, list) or not all(isinstance(subset, str) for subset in subsets):
        raise ConfigError(
            f"{place}: subsets is {subsets!r}; expected a list of names; give a subset with settings of its own "
            "an entry of its own"
        )
    if len(splits) != 1:
        raise ConfigError(
            f"{place}: split is {splits!r}; expected one; give each an entry of its own"
        )
    help_text = value.get("help", "")
    entry = {
        "hf_id": value.get("hf_dataset_id"),
        "ms_id": value.get("ms_dataset_id"),
        "files": value.get("dataset_path"),
        "subset": subsets[:1],
        "subsets": subsets,
        "split": splits[0],
        "columns": value.get("columns"),
        "tags": value.get("tags"),
        "description": " ".join(help_text) if isinstance(help_text, list) else help_text,
    }
    return make_entry(name, entry, origin=str(path), folder=path.parent)


def _check_keys(place: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise ConfigError(
                f'{place}: unknown key "{key}"{did_you_mean(str(key), known)} (known: {", ".join(known)})'
            )
