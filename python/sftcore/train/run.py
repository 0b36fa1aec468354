"""`train`: from a configuration to a tuned model."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.data.run import save_data
from sftcore.errors import ConfigError, SftcoreError
from sftcore.models import load_model, pick_dtype, quieten, resolve_model
from sftcore.train.callbacks import EvaluateAtEnd, ShowProgress, WriteLog, draw_loss
from sftcore.train.ledger import WriteLedger, continue_ledger
from sftcore.train.loaders import describe_data, open_loaders, say
from sftcore.train.output import make_run_folder, write_args
from sftcore.train.trainer import SftTrainer, read_loader_state
from sftcore.tuners import apply_tuner, count_parameters


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains as `config` says.

    Returns:
        `best_model_checkpoint`, `last_model_checkpoint`, `best_metric` (the lowest evaluation loss,
        None without evaluation), `global_step`, `log_history`, `output_dir`, `data` (the report of the
        loader).

    Raises:
        SftcoreError: A setting, a row, the template or the tokenizer is wrong. Nothing is written
            before all of these are known to be right.
    """
    quieten()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    folder = resolve_model(config.model)
    encoder = Encoder.from_pretrained(
        folder,
        template=config.template,
        max_length=config.max_length,
        truncation_strategy=config.truncation_strategy,
        system=config.system,
        tokenizer_engine=config.tokenizer_engine,
        train_on=config.train_on,
        train_on_eos=config.train_on_eos,
        ignore_empty_think=config.ignore_empty_think,
        reasoning=config.reasoning,
        control_tokens_in_content=config.control_tokens_in_content,
        chat_template_kwargs=config.template_arguments,
    )
    if encoder.tokenizer_engine_reason:
        say(f"tokenizer: the reference engine, as {encoder.tokenizer_engine_reason}")
    train_loader, eval_loader = open_loaders(config, encoder, world_size)
    say(describe_data(train_loader, eval_loader))
    set_seed(config.seed)
    base = load_model(folder, torch_dtype=config.torch_dtype, attn_impl=config.attn_impl)
    _check_length(config, base)
    model = apply_tuner(base, config)
    total, trained, _ = count_parameters(model)
    say(f"model: {config.model}, {total:,} parameters, {trained:,} trained ({trained / total:.2%})")
    max_steps = config.max_steps
    steps_per_epoch = None  # a stream does not know
    if isinstance(train_loader, BatchLoader):
        steps_per_epoch = train_loader.steps_per_epoch
        if max_steps == -1:
            max_steps = train_loader.num_steps(config.num_train_epochs)
    run_folder = make_run_folder(config)
    write_args(run_folder, config)
    if isinstance(train_loader, BatchLoader) and os.environ.get("RANK", "0") == "0":
        save_data(train_loader, run_folder)
    save_every = max(1, min(500, steps_per_epoch or 500, max_steps))
    arguments = _training_arguments(
        config, run_folder, eval_loader, max_steps, save_every, world_size
    )
    if arguments.world_size != world_size:
        raise SftcoreError(
            f"asked for {world_size} processes, but Transformers runs {arguments.world_size}"
        )
    per_rank = config.accumulation_steps(world_size) * config.per_device_train_batch_size
    an_epoch = f", {steps_per_epoch} an epoch" if steps_per_epoch else ""
    say(
        f"steps: {max_steps} of {per_rank * world_size} examples{an_epoch}; learning rate "
        f"{config.effective_learning_rate:g}; output: {run_folder}"
    )
    tokens = None
    if steps_per_epoch:
        parts = train_loader.report["epoch"]
        tokens = sum(part["trained_tokens"] for part in parts) / steps_per_epoch
    progress = ShowProgress(lines=config.disable_tqdm, trained_tokens_per_step=tokens)
    trainer = SftTrainer(
        model=model,
        args=arguments,
        train_loader=train_loader,
        eval_loader=eval_loader,
        config=config,
        callbacks=[
            EvaluateAtEnd(evaluate=eval_loader is not None),
            WriteLedger(train_loader, run_folder),
            WriteLog(run_folder),
            progress,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        if config.resume_from_checkpoint:
            checkpoint = Path(config.resume_from_checkpoint)
            train_loader.load_state_dict(
                read_loader_state(checkpoint), allow_data_change=config.allow_data_change
            )
            continue_ledger(checkpoint, run_folder)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    finally:
        progress.stop()
    draw_loss(trainer.state.log_history, run_folder / "images" / "loss.png")
    result = _result(trainer, run_folder, train_loader)
    say(f"best checkpoint: {result['best_model_checkpoint']}; curves: {run_folder / 'images'}")
    return result


def _check_length(config: TrainConfig, model: Any) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"--max_length {config.max_length} is out of range: {config.model} has {limit} positions"
        )


def _training_arguments(
    config: TrainConfig,
    run_folder: Path,
    eval_loader: BatchLoader | None,
    max_steps: int,
    save_every: int,
    world_size: int,
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    dtype = pick_dtype(config.torch_dtype)
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
        "logging_first_step": True,
        "eval_strategy": "steps" if eval_loader else "no",
        "eval_steps": config.eval_steps or save_steps,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": config.save_total_limit,
        "metric_for_best_model": "eval_loss" if eval_loader else None,
        "greater_is_better": False,
        "seed": config.seed,
        "bf16": on_gpu and dtype == torch.bfloat16,
        "fp16": on_gpu and dtype == torch.float16,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        # the loader goes on by its own state, nothing is replayed
        "ignore_data_skip": True,
    }
    names = set(TrainingArguments.__dataclass_fields__)
    # Transformers 6 drops the first pair of names
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    arguments[f"{prefix}_checkpointing"] = config.gradient_checkpointing
    if config.gradient_checkpointing:
        arguments[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainingArguments(**arguments)


def _result(
    trainer: SftTrainer, run_folder: Path, train_loader: BatchLoader | StreamLoader
) -> dict[str, Any]:
    state = trainer.state
    last = run_folder / f"checkpoint-{state.global_step}"
    result = {
        "best_model_checkpoint": state.best_model_checkpoint or str(last),
        "last_model_checkpoint": str(last),
        "best_metric": state.best_metric,
        "global_step": state.global_step,
        "log_history": state.log_history,
        "output_dir": str(run_folder),
        "data": train_loader.report,
    }
    if state.is_world_process_zero:
        text = json.dumps(result, ensure_ascii=False, indent=2)
        (run_folder / "result.json").write_text(text, encoding="utf-8")
    return result
