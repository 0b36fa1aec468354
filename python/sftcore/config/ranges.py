"""Checks that settings share: their range, and whether they have an effect."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from sftcore.errors import ConfigError


def check_range(name: str, value: float | None, expected: str, *, holds: bool) -> None:
    """Raises a ConfigError that says what `--name` should be, unless `holds`."""
    if not holds:
        raise ConfigError(f"--{name} {value} is out of range: expected {expected}")


def check_least(config: Any, least: float, *names: str) -> None:
    """Raises a ConfigError where a setting is given and below `least`."""
    for name in names:
        value = getattr(config, name)
        check_range(name, value, f"{least} or more", holds=value is None or value >= least)


def check_positive(config: Any, *names: str) -> None:
    """Raises a ConfigError where a setting is given and is not above 0."""
    for name in names:
        value = getattr(config, name)
        check_range(name, value, "a number > 0", holds=value is None or value > 0)


def check_share(config: Any, *names: str) -> None:
    """Raises a ConfigError where a setting is not at least 0 and below 1."""
    for name in names:
        value = getattr(config, name)
        check_range(name, value, "0 <= number < 1", holds=0 <= value < 1)


def check_seed(name: str, value: int | None) -> None:
    """Raises a ConfigError where a seed is given that not all generators of random numbers take."""
    holds = value is None or 0 <= value < 2**32
    check_range(name, value, "0 to 4294967295", holds=holds)


def check_effects(config: Any, home: type, needed: dict[str, tuple[bool, str]]) -> None:
    """Raises a ConfigError where a setting is not at its default and what it needs is not there.

    Args:
        config: The settings.
        home: The dataclass that declares them.
        needed: The setting, to whether what it needs is there, and the name of that.
    """
    for name, (is_there, what) in needed.items():
        if not is_there and getattr(config, name) != default_of(home, name):
            raise ConfigError(f"--{name} has no effect without {what}")


def default_of(home: type, name: str) -> Any:
    """Returns the default of a setting, where it has one."""
    field = home.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default if field.default_factory is MISSING else field.default_factory()
