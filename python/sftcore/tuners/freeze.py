"""Full training, and training of a part of the weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.models.shapes import full_size

if TYPE_CHECKING:
    from torch import nn


def train_weights(model: nn.Module, config: TrainConfig) -> None:
    """Sets the parameters that `config` names to be trained, and the others not.

    Without settings that freeze anything, `--trainable_parameters` and its regular expression name all that is trained.

    Raises:
        ConfigError: A name fits no parameter, or none is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = _begin("freeze_parameters", config.freeze_parameters, names)
    frozen |= _match("freeze_parameters_regex", config.freeze_parameters_regex, names)
    frozen |= _lowest(model, config.freeze_parameters_ratio)
    trained = _begin("trainable_parameters", config.trainable_parameters, names)
    trained |= _match("trainable_parameters_regex", config.trainable_parameters_regex, names)
    if trained and not frozen:
        frozen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("all parameters are frozen; name some with --trainable_parameters")


def _begin(setting: str, beginnings: list[str], names: list[str]) -> set[str]:
    chosen: set[str] = set()
    for beginning in beginnings:
        found = {name for name in names if name.startswith(beginning)}
        if not found:
            raise ConfigError(
                f"--{setting} {beginning} begins no name of a parameter of this model; names are like "
                f"{', '.join(_kinds(names))}"
            )
        chosen |= found
    return chosen


def _match(setting: str, pattern: str | None, names: list[str]) -> set[str]:
    if pattern is None:
        return set()
    found = {name for name in names if re.search(pattern, name)}
    if not found:
        raise ConfigError(
            f"--{setting} {pattern} is found in no name of a parameter of this model; names are like "
            f"{', '.join(_kinds(names))}"
        )
    return found


def _lowest(model: nn.Module, share: float) -> set[str]:
    limit = share * sum(full_size(parameter) for parameter in model.parameters())
    seen, names = 0, set()
    for name, parameter in model.named_parameters():
        seen += full_size(parameter)
        if seen > limit:
            break
        names.add(name)
    if share and not names:
        raise ConfigError(
            f"--freeze_parameters_ratio {share} is less than the first parameter of this model, so that nothing would "
            "be frozen; take a larger share"
        )
    return names


def _kinds(names: list[str]) -> list[str]:
    """Returns one name of each kind: those of the first layer, and those outside of layers."""
    return [name for name in names if not re.search(r"\.[1-9]\d*\.", name)]
