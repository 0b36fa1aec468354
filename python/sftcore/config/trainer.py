"""What else the Trainer of Transformers is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftcore.config.pairs import read_pairs
from sftcore.config.schema import did_you_mean
from sftcore.config.training_arguments import (
    NEEDLESS,
    NOT_YET,
    REFUSED,
    convert,
    read_training_arguments,
)
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Trainer. What else the Trainer of Transformers is told."""

    training_arguments: str = "{}"
    """More of Transformers' TrainingArguments, as a JSON object; each of them is also a flag and a key of its own name
    (--torch_empty_cache_steps 50), and so are the flags of earlier ms-swift (docs/flags.md)."""

    def _check_trainer(self) -> None:
        _ = self.trainer_arguments

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """`training_arguments` as a dict of values of the right types.

        Raises:
            ConfigError: It is no JSON object, a name is unknown or has no effect here, or a value is of a wrong type.
        """
        given = read_pairs(
            "training_arguments", self.training_arguments, '{"torch_empty_cache_steps": 50}'
        )
        if not given:
            return {}
        known = read_training_arguments()
        settings = set(type(self).__dataclass_fields__)
        for name, value in given.items():
            if name in settings:
                raise ConfigError(f"--training_arguments {name} is a setting; pass --{name}")
            if name not in known:
                raise ConfigError(
                    f"--training_arguments {name} is no argument of TrainingArguments in the installed version of "
                    f"transformers{did_you_mean(name, known)}"
                )
            given[name] = convert(known[name], value)
            reason = NEEDLESS.get(name) or REFUSED.get(name) or NOT_YET.get(name)
            if reason and given[name] != known[name].default:
                raise ConfigError(f"--training_arguments {name} has no effect: {reason}")
        return given
