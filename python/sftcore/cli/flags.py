"""Settings as flags: one for each field of a configuration, with its documentation as help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from sftcore.config.schema import Setting, build, did_you_mean, read_yaml, settings_of
from sftcore.config.translate import old_names, rename, words
from sftcore.errors import ConfigError

T = TypeVar("T")


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds `--config` and a flag for each setting, in sections."""
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings from a file; flags stand before them"
    )
    parser.set_defaults(settings_class=config)
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
    for name, setting in settings.items():
        if setting.is_list and name in flags:
            flags[name] = [part for word in flags[name] for part in _split(name, word)]
    values = rename(config.__name__, settings, {**flags, **vars(known).get("more_flags", {})})
    for name, value in values.items():
        if name in settings and settings[name].is_list and isinstance(value, str):
            values[name] = words(value)
    if known.config is None:
        return build(config, values, origin="command line")
    path = Path(known.config)
    from_file = rename(config.__name__, settings, read_yaml(path))
    # the file is checked for itself, so that an error names it
    merged = {**from_file, **values}
    return build(
        config, merged, origin=str(path) if set(merged) == set(from_file) else f"{path} and flags"
    )


def read_more_flags(config: type[Any], unknown: Sequence[str]) -> dict[str, Any]:
    """Returns the flags that are no settings but known by other names: a word, or several as a list.

    Args:
        config: The settings of the command.
        unknown: What the parser left over.

    Raises:
        ConfigError: One is not known, or a word belongs to no flag.
    """
    found: dict[str, list[str]] = {}
    last = None
    for word in unknown:
        if word.startswith("--"):
            last, mark, value = word[2:].partition("=")
            found[last] = [value] if mark else []
        elif last is None:
            raise ConfigError(f"unknown word {word}")
        else:
            found[last].append(word)
    known = old_names(config.__name__)
    for name in found:
        if name not in known:
            near = did_you_mean(
                f"--{name}", [f"--{each}" for each in {*settings_of(config), *known}]
            )
            raise ConfigError(f"unknown flag --{name}{near}")
    # a flag alone says yes
    return {
        name: values[0] if len(values) == 1 else values or "true" for name, values in found.items()
    }


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
        # they are checked with all other values, as they too have old names
        arguments |= {"metavar": "|".join(setting.choices)}
    elif setting.kind is bool:
        arguments |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    else:
        arguments |= {"metavar": {int: "N", float: "X"}.get(setting.kind, "TEXT")}
    group.add_argument(f"--{setting.name}", **arguments)
