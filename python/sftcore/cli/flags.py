"""Settings as flags: one for each field of a configuration, with its documentation as help."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from sftcore.config.schema import Setting, build, read_yaml, settings_of

T = TypeVar("T")


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds `--config` and a flag for each setting, in sections."""
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings from a file; flags stand before them"
    )
    sections: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings_of(config).values():
        if setting.section not in sections:
            sections[setting.section] = parser.add_argument_group(setting.section.lower())
        _add_flag(sections[setting.section], setting)


def read_flags(config: type[T], known: argparse.Namespace) -> T:
    """Makes a configuration of the file and the flags.

    Raises:
        ConfigError: A setting is unknown, of the wrong type, out of range, or missing.
        FileNotFoundError: There is no such file.
    """
    settings = settings_of(config)
    flags = {name: value for name, value in vars(known).items() if name in settings}
    values: dict[str, Any] = {}
    for name, value in flags.items():
        if settings[name].is_list:
            value = [part for word in value for part in _split(name, word)]
        values[name] = value
    if known.config is None:
        return build(config, values, origin="command line")
    path = Path(known.config)
    from_file = read_yaml(path)
    # the file is checked for itself, so that an error names it
    merged = {**from_file, **values}
    return build(
        config, merged, origin=str(path) if set(merged) == set(from_file) else f"{path} and flags"
    )


def _split(name: str, word: str) -> list[str]:
    # the name of a model or of its author may hold a comma, and so may a prompt
    if name in ("model_name", "model_author", "sample_prompts"):
        return [word]
    return [part for part in word.split(",") if part]


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    text = setting.doc.replace("%", "%%")
    default = setting.default
    if default not in (None, dataclasses.MISSING, []):
        shown = " ".join(default) if isinstance(default, list) else default
        text += f" (default: {shown})"
    arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if setting.is_list:
        arguments |= {"nargs": "+", "metavar": setting.name.upper()}
    elif setting.choices:
        arguments |= {"choices": setting.choices}
    elif setting.kind is bool:
        arguments |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    else:
        arguments |= {"metavar": {int: "N", float: "X"}.get(setting.kind, "TEXT")}
    group.add_argument(f"--{setting.name}", **arguments)
