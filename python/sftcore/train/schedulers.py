"""The learning rate of each step.

In come the settings and the number of steps, out go arguments of Transformers' schedulers, with the
defaults that these lack. What a scheduler would not take is an error before anything is loaded.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from sftcore.config import TrainConfig
from sftcore.config.optimization import MEASURED, share_of
from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError

_DECAY_SHARE = 0.1
_GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "verbose"}


def schedule_arguments(
    config: TrainConfig, num_steps: int, *, greater_is_better: bool = False
) -> dict[str, Any]:
    """Returns the arguments of `TrainingArguments` that make the schedule.

    `cosine_with_min_lr` ends at a tenth of the learning rate where nothing says another end, and
    `warmup_stable_decay` decays in the last tenth of the steps (Hägele et al. 2024, arXiv:2405.18392); a
    `num_decay_steps` or `num_stable_steps` below 1 is a share of the steps. `greedy` stays within a tenth and ten
    times the learning rate.

    Args:
        config: The settings of the run.
        num_steps: All optimizer steps.
        greater_is_better: Whether the metric that a measuring schedule follows should grow.

    Raises:
        ConfigError: The warm-up and the decay are longer than the run.
    """
    kind = config.lr_scheduler_type
    arguments = config.scheduler_arguments
    warmup = config.num_warmup_steps(num_steps)
    if "min_lr" in kind and not {"min_lr", "min_lr_rate"} & set(arguments):
        arguments["min_lr_rate"] = 0.1
    if kind == "warmup_stable_decay":
        arguments.setdefault("num_decay_steps", _DECAY_SHARE)
        for name in {"num_decay_steps", "num_stable_steps"} & set(arguments):
            if 0 < arguments[name] < 1:
                arguments[name] = share_of(arguments[name], num_steps)
        parts = warmup + arguments["num_decay_steps"] + arguments.get("num_stable_steps", 0)
        if parts > num_steps:
            raise ConfigError(
                f"--lr_scheduler_type {kind} has {parts} steps of warm-up, decay and what is between, but the run "
                f"has {num_steps}"
            )
    if kind in MEASURED:
        arguments.setdefault("mode", "max" if greater_is_better else "min")
    if kind == "greedy":
        # its own limits, 0.001 and 1, are far above the learning rates of tuning
        arguments.setdefault("min_lr", config.effective_learning_rate / 10)
        arguments.setdefault("max_lr", config.effective_learning_rate * 10)
    return {
        "lr_scheduler_type": kind,
        "lr_scheduler_kwargs": arguments,
        "warmup_steps": warmup,
    }


def warmup_note(config: TrainConfig, num_steps: int) -> str | None:
    """Returns a line where a run ends before its learning rate has risen; None where it rises."""
    warmup = config.num_warmup_steps(num_steps)
    if warmup < num_steps:
        return None
    return (
        f"note: the warm-up of {warmup:,} steps is not over when the run ends after {num_steps:,}: the learning rate "
        f"never comes to {config.effective_learning_rate:g}"
    )


def check_schedule(config: TrainConfig) -> None:
    """Raises a ConfigError where the installed Transformers does not take the schedule as it is set."""
    kind = config.lr_scheduler_type
    functions = {str(name.value): function for name, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if kind not in functions:
        raise ConfigError(
            f"--lr_scheduler_type {kind} is not in the installed version of transformers; expected one of "
            f"{', '.join(functions)}"
        )
    function: Any = functions[kind]
    if kind == "reduce_lr_on_plateau":
        function = torch.optim.lr_scheduler.ReduceLROnPlateau
    elif kind == "greedy":
        from transformers.optimization import GreedyLR  # younger than the oldest supported version

        function = GreedyLR
    known = set(inspect.signature(function).parameters) - _GIVEN - {"kwargs"}
    for name in config.scheduler_arguments:
        if name not in known:
            raise ConfigError(
                f"--lr_scheduler_kwargs {name} is unknown to {kind}; expected some of "
                f"{', '.join(sorted(known))}{did_you_mean(name, known)}"
            )
    try:
        # longer than any run; one that is too short for its schedule says so when its steps are counted
        _scheduler(config, 10**12)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--lr_scheduler_kwargs {config.lr_scheduler_kwargs} does not fit {kind}: {error}"
        ) from error


def learning_rates(config: TrainConfig, num_steps: int) -> list[float]:
    """Returns the learning rate of each of `num_steps`, for parameters without a rate of their own.

    Raises:
        ConfigError: The schedule follows what is measured, so nobody knows it beforehand.
    """
    if config.lr_scheduler_type in MEASURED:
        raise ConfigError(
            f"--lr_scheduler_type {config.lr_scheduler_type} follows what is measured, so it is not known beforehand"
        )
    scheduler = _scheduler(config, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def _scheduler(config: TrainConfig, num_steps: int) -> Any:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=config.effective_learning_rate)
    arguments = schedule_arguments(config, num_steps)
    return get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=arguments["warmup_steps"],
        num_training_steps=num_steps,
        scheduler_specific_kwargs=arguments["lr_scheduler_kwargs"],
    )
