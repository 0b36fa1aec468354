"""The settings of a run as the arguments of the Trainer of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader
from sftcore.errors import ConfigError
from sftcore.train.best import evaluation_arguments
from sftcore.train.distributed.engine import Engine
from sftcore.train.memory import memory_arguments
from sftcore.train.optimizers import optimizer_name
from sftcore.train.schedulers import schedule_arguments


def training_arguments(
    config: TrainConfig,
    run_folder: Path,
    eval_loader: BatchLoader | None,
    max_steps: int,
    save_every: int,
    engine: Engine,
) -> TrainingArguments:
    """Returns the arguments of the Trainer.

    Args:
        config: The settings of the run.
        run_folder: Where it writes.
        eval_loader: What it evaluates on, if anything.
        max_steps: All optimizer steps of the run.
        save_every: The steps between two checkpoints where the settings do not say.
        engine: How the processes share the run.
    """
    on_gpu = torch.cuda.is_available()
    save_steps = config.save_steps or save_every
    arguments: dict[str, Any] = {
        "output_dir": str(run_folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(engine.world.data_size),
        "learning_rate": config.effective_learning_rate,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "adam_epsilon": config.adam_epsilon,
        "optim": optimizer_name(config),
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "logging_steps": config.logging_steps,
        "logging_first_step": config.logging_first_step,
        "save_strategy": config.save_strategy,
        "save_steps": save_steps,
        "save_only_model": config.save_only_model,
        # losses that are not finite are found without it, and it waits for each of them
        "logging_nan_inf_filter": False,
        "seed": config.seed,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        # the loggers of --report_to are made in loggers.py
        "report_to": "none",
        "project": config.project,
        "run_name": config.run_name or run_folder.name,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        # the loader goes on by its own state, nothing is replayed
        "ignore_data_skip": True,
    }
    arguments |= memory_arguments(config) | engine.training_arguments()
    evaluation = evaluation_arguments(config, eval_loader, save_steps)
    arguments |= evaluation
    arguments |= schedule_arguments(
        config, max_steps, greater_is_better=bool(evaluation.get("greater_is_better"))
    )
    given = config.trainer_arguments
    try:
        return TrainingArguments(**merge_given(arguments, given))
    except (TypeError, ValueError) as error:
        if not given or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--training_arguments {config.training_arguments}: {error}") from error


def merge_given(arguments: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with those that the user gave under Transformers' own names, which stand last.

    Raises:
        ConfigError: A GPU is to be left out, which the settings made before did not know.
    """
    if given.get("use_cpu") and torch.cuda.is_available():
        raise ConfigError(
            "--use_cpu comes too late to leave out a GPU; hide it instead: CUDA_VISIBLE_DEVICES= sftcore train ..."
        )
    return {**arguments, **given}
