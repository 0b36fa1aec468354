"""The settings of a run as the arguments of the Trainer of Transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader
from sftcore.train.memory import memory_arguments


def training_arguments(
    config: TrainConfig,
    run_folder: Path,
    eval_loader: BatchLoader | None,
    max_steps: int,
    save_every: int,
    world_size: int,
) -> TrainingArguments:
    """Returns the arguments of the Trainer.

    Args:
        config: The settings of the run.
        run_folder: Where it writes.
        eval_loader: What it evaluates on, if anything.
        max_steps: All optimizer steps of the run.
        save_every: The steps between two checkpoints where the settings do not say.
        world_size: The number of processes.
    """
    on_gpu = torch.cuda.is_available()
    save_steps = config.save_steps or save_every
    arguments: dict[str, Any] = {
        "output_dir": str(run_folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "learning_rate": config.effective_learning_rate,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "max_grad_norm": config.max_grad_norm,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": math.ceil(config.warmup_ratio * max_steps),
        "optim": config.optim,
        "logging_steps": config.logging_steps,
        "logging_first_step": config.logging_first_step,
        "eval_strategy": "steps" if eval_loader else "no",
        "eval_steps": config.eval_steps or save_steps,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": config.save_total_limit,
        "metric_for_best_model": "eval_loss" if eval_loader else None,
        "greater_is_better": False,
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
    arguments |= memory_arguments(config)
    return TrainingArguments(**arguments)
