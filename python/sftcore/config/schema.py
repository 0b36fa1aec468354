"""Dataclass fields as settings: their names, types, defaults and documentation.

A setting is a field of a dataclass with a string under it. Its type is `str`, `int`, `float`,
`bool`, a `Literal` of strings, `list[str]`, or one of these or None.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sftcore.config.translate import combine, old_names, rename
from sftcore.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of a command.

    Attributes:
        name: The field, the flag without its dashes, and the key in YAML.
        kind: `str`, `int`, `float` or `bool`; of the items where it is a list.
        is_list: Whether it takes several values.
        choices: The values it may take, where they are fixed.
        optional: Whether None means something.
        default: The value where none is given; `dataclasses.MISSING` where one must be.
        doc: One or two sentences.
        section: The concern it belongs to.
    """

    name: str
    kind: type
    is_list: bool
    choices: tuple[str, ...]
    optional: bool
    default: Any
    doc: str
    section: str


def settings_of(config: type[Any]) -> dict[str, Setting]:
    """Returns the settings of a dataclass, those of its bases first."""
    hints = typing.get_type_hints(config)
    homes = {
        name: (base, doc)
        for base in reversed(config.__mro__)
        if dataclasses.is_dataclass(base)
        for name, doc in _field_docs(base).items()
    }
    settings = {}
    for field in dataclasses.fields(config):
        home, doc = homes[field.name]
        settings[field.name] = _setting(field, hints[field.name], home, doc)
    return settings


def build(config: type[T], values: Mapping[str, Any], *, origin: str) -> T:
    """Makes a configuration of values from a file or from code.

    Args:
        config: A dataclass of settings.
        values: Name to value; numbers may stand where strings are wanted and the other way round. Names may be those
            of ms-swift and of Transformers too; what they are now is said.
        origin: Where the values come from, for errors.

    Raises:
        ConfigError: A name is unknown, a value is of the wrong type or out of range, or one that
            is needed is missing.
    """
    settings, command = settings_of(config), config.__name__
    given = {}
    for name, value in combine(command, settings, rename(command, settings, values)).items():
        if name not in settings:
            near = did_you_mean(name, [*settings, *old_names(command)])
            raise ConfigError(f'{origin}: unknown setting "{name}"{near}')
        given[name] = _convert(settings[name], value, origin)
    for setting in settings.values():
        if setting.default is dataclasses.MISSING and setting.name not in given:
            raise ConfigError(f"--{setting.name} is missing: {setting.doc}")
    return config(**given)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: It is not YAML, or not a mapping.
    """
    import yaml  # a light command line loads it only for --config

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean --x?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _field_docs(config: type) -> dict[str, str]:
    """Returns the string under each field that a class declares itself."""
    tree = ast.parse(inspect.getsource(config))
    body = typing.cast("ast.ClassDef", tree.body[0]).body
    docs = {}
    for field, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
            docs[field.target.id] = text
    return docs


def _setting(field: dataclasses.Field[Any], hint: Any, home: type, doc: str) -> Setting:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        optional, hint = True, inner[0]
    is_list = typing.get_origin(hint) is list
    if is_list:
        hint = typing.get_args(hint)[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is typing.Literal:
        choices, hint = typing.get_args(hint), str
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Setting(
        name=field.name,
        kind=hint,
        is_list=is_list,
        choices=choices,
        optional=optional,
        default=default,
        doc=doc,
        section=(home.__doc__ or "").split(".")[0],
    )


def _convert(setting: Setting, value: Any, origin: str) -> Any:
    if value is None and setting.optional:
        return None
    if setting.is_list:
        items = value if isinstance(value, list | tuple) else [value]
        return [_convert_one(setting, item, origin) for item in items]
    return _convert_one(setting, value, origin)


def _convert_one(setting: Setting, value: Any, origin: str) -> Any:
    wanted = setting.kind.__name__
    if setting.choices:
        wanted = ", ".join(setting.choices)
        if value in setting.choices:
            return value
    elif setting.kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "false", "no", "0"):
            return str(value).lower() in ("true", "yes", "1")
        wanted = "true or false"
    elif setting.kind is str:
        # a mapping in YAML stands for the JSON object that the setting takes
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        if not isinstance(value, bool | list):
            return str(value)
    elif not isinstance(value, bool):
        try:
            number = float(value)
            if setting.kind is float and math.isfinite(number):
                return number
            if number.is_integer():
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ConfigError(f"{origin}: {setting.name} is {value!r}; expected {wanted}")
