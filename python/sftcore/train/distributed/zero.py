"""DeepSpeed's settings, filled from those of the run and held to them.

In come what `--deepspeed` gave and the other settings; out goes a dict without `auto`. A value of a user's file that
says something else than a setting of the run is an error that names both, and so is what has no effect here:
nothing of the file is overruled in silence.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from sftcore.config import TrainConfig
from sftcore.config.zero import read_deepspeed
from sftcore.errors import ConfigError
from sftcore.models.dtypes import choose_dtypes
from sftcore.train.distributed.world import World

_NO_EFFECT = {
    "amp": "--torch_dtype says the precision",
    "autotuning": "it starts runs of its own",
    "curriculum_learning": "batches come from the data plan of the run",
    "data_efficiency": "batches come from the data plan of the run",
    "elasticity": "it changes the size of the global batch",
    "compression_training": "it needs code of its own in the model",
    "sequence_parallel_size": "--sequence_parallel_size says it",
    "flops_profiler": "it profiles the loop of DeepSpeed",
}
_ADAMS = ("Adam", "AdamW")


def deepspeed_settings(config: TrainConfig, world: World) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings of DeepSpeed, and lines on what the run says in their place.

    Args:
        config: The settings of the run.
        world: Its processes.

    Raises:
        ConfigError: A value contradicts a setting of the run, or has no effect.
    """
    assert config.deepspeed is not None
    settings = copy.deepcopy(read_deepspeed(config.deepspeed))
    for name, reason in _NO_EFFECT.items():
        if settings.get(name):
            raise _fault(config, name, settings[name], f"has no effect: {reason}; remove it")
    if settings.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise _fault(
            config,
            "tensor_parallel.autotp_size",
            settings["tensor_parallel"]["autotp_size"],
            "has no effect: --tensor_parallel_size does it; remove it",
        )
    if settings.get("managed_gradient_accumulation") is False:
        raise _fault(
            config, "managed_gradient_accumulation", False, "does not fit the Trainer; remove it"
        )
    micro, steps = (
        config.per_device_train_batch_size,
        config.accumulation_steps(world.data_size),
    )
    dtype = lowered_dtype(config)
    for name, value, flag in (
        ("train_micro_batch_size_per_gpu", micro, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", steps, "gradient_accumulation_steps"),
        ("gradient_clipping", config.max_grad_norm, "max_grad_norm"),
    ):
        _fill(config, settings, name, value, f"--{flag} is {value}")
    _fill_batch(config, settings, world)
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        part = settings.setdefault(name, {})
        _fill(
            config,
            part,
            "enabled",
            dtype == kind,
            f"the run computes in {str(dtype).removeprefix('torch.')} (--torch_dtype {config.torch_dtype})",
            f"{name}.enabled",
        )
    if dtype == torch.bfloat16:
        # a step whose gradients are not finite is left out, as it is with float16
        settings["bf16"].setdefault("check_grad_overflow", True)
        if steps > 1 and settings["zero_optimization"].get("stage", 0) >= 2:
            # a sum of many micro-batches would lose the small ones
            settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    lines = _take_over(config, settings)
    _settle_zero(config, settings)
    return settings, lines


def lowered_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype of the weights that DeepSpeed computes with; its optimizer has float32 ones beside."""
    dtypes = choose_dtypes(config.torch_dtype, trains_weights=config.trains_weights)
    return dtypes.compute


def _settle_zero(config: TrainConfig, settings: dict[str, Any]) -> None:
    zero = settings["zero_optimization"]
    zero.setdefault("stage", 0)
    on_gpu = torch.cuda.is_available()
    zero.setdefault("overlap_comm", on_gpu and zero["stage"] > 0)
    for part in ("offload_optimizer", "offload_param"):
        if not on_gpu and zero.get(part, {}).get("pin_memory"):
            zero[part]["pin_memory"] = False  # there is no transfer to speed up
    if zero["stage"] == 3:
        name = "stage3_gather_16bit_weights_on_model_save"
        if zero.get(name) is False:
            raise _fault(
                config,
                f"zero_optimization.{name}",
                False,
                "would leave checkpoints without a model; remove it",
            )
        zero[name] = True
    settings["zero_allow_untested_optimizer"] = True
    # a line each few steps is not of use beside those of the run
    settings["steps_per_print"] = 10**9


def _fill_batch(config: TrainConfig, settings: dict[str, Any], world: World) -> None:
    found = settings.pop("train_batch_size", "auto")
    # DeepSpeed knows no group of ranks that share their examples, so it counts all ranks
    examples = (
        settings["train_micro_batch_size_per_gpu"]
        * settings["gradient_accumulation_steps"]
        * world.data_size
    )
    if found not in ("auto", examples):
        raise _fault(
            config,
            "train_batch_size",
            found,
            f"contradicts the run: {world.data_size} shares of the data times --per_device_train_batch_size "
            f'{config.per_device_train_batch_size} times the accumulation make {examples}; take "auto"',
        )


def _take_over(config: TrainConfig, settings: dict[str, Any]) -> list[str]:
    """Removes the blocks of optimizer and scheduler where they say what the run says."""
    lines = []
    optimizer = settings.pop("optimizer", None)
    if optimizer is not None:
        kind, values = optimizer.get("type", "AdamW"), dict(optimizer.get("params", {}))
        if kind not in _ADAMS:
            raise _fault(
                config,
                "optimizer.type",
                kind,
                "is an optimizer of DeepSpeed's own; remove the block, as --optim says the optimizer",
            )
        for name, value, flag in (
            ("lr", config.effective_learning_rate, "learning_rate"),
            ("betas", [config.adam_beta1, config.adam_beta2], "adam_beta1 and --adam_beta2"),
            ("eps", config.adam_epsilon, "adam_epsilon"),
            ("weight_decay", config.weight_decay, "weight_decay"),
        ):
            _fill(config, values, name, value, f"--{flag} give {value}", f"optimizer.params.{name}")
        lines.append(
            f"deepspeed: the optimizer block is what --optim {config.optim} and its settings say"
        )
    scheduler = settings.pop("scheduler", None)
    if scheduler is not None:
        fixed = {k: v for k, v in scheduler.get("params", {}).items() if v != "auto"}
        if fixed:
            name, value = next(iter(fixed.items()))
            raise _fault(
                config,
                f"scheduler.params.{name}",
                value,
                f"has no effect: --lr_scheduler_type {config.lr_scheduler_type} and its settings say how the learning "
                "rate runs; remove the block",
            )
        lines.append(
            f"deepspeed: the scheduler block is what --lr_scheduler_type {config.lr_scheduler_type} says"
        )
    return lines


def _fill(
    config: TrainConfig,
    home: dict[str, Any],
    name: str,
    value: Any,
    said: str,
    path: str | None = None,
) -> None:
    found = home.get(name, "auto")
    if found != "auto" and found != value:
        raise _fault(config, path or name, found, f'contradicts the run: {said}; take "auto"')
    home[name] = value


def _fault(config: TrainConfig, name: str, value: Any, text: str) -> ConfigError:
    return ConfigError(f"--deepspeed {config.deepspeed}: {name} {value} {text}")
