"""`train`: from a configuration to a tuned model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.data.run import save_data
from sftcore.errors import SftcoreError
from sftcore.models import quieten, resolve_model
from sftcore.train.arguments import training_arguments
from sftcore.train.dry_run import dry_run, without_files
from sftcore.train.largest import TryLargest, explain_out_of_memory
from sftcore.train.ledger import WriteLedger, continue_ledger
from sftcore.train.loaders import describe_data, open_loaders, say
from sftcore.train.log import WriteLog, finite
from sftcore.train.loggers import choose_loggers, make_loggers
from sftcore.train.open import open_model, padded
from sftcore.train.output import make_run_folder, write_args, write_environment
from sftcore.train.progress import ShowProgress
from sftcore.train.schedule import EvaluateAtEnd
from sftcore.train.speed import MeasureSpeed, describe_speed
from sftcore.train.trainer import SftTrainer, read_loader_state


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The optimizer steps of a run.

    Attributes:
        total: All of them.
        per_epoch: Those of the first epoch; None where a stream does not know.
    """

    total: int
    per_epoch: int | None


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains as `config` says.

    Returns:
        `best_model_checkpoint`, `last_model_checkpoint`, `best_metric` (the lowest evaluation loss,
        None without evaluation), `global_step`, `log_history`, `output_dir`, `data` (the report of the
        loader), and `speed` (seconds, tokens, rates, shares and `memory_gib`). With `dry_run`, the plan.

    Raises:
        SftcoreError: A setting, a row, the template or the tokenizer is wrong. Nothing is written
            before all of these are known to be right.
    """
    quieten()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    loggers, note = choose_loggers(config)
    if config.dry_run:
        config = without_files(config)
    folder = resolve_model(config.model, weights=not config.dry_run)
    encoder = _open_encoder(config, folder)
    train_loader, eval_loader = open_loaders(config, encoder, world_size)
    say(describe_data(train_loader, eval_loader))
    set_seed(config.seed)
    if config.dry_run:
        return dry_run(config, folder, encoder, (train_loader, eval_loader), world_size)
    opened = open_model(config, folder)
    model, method = opened.model, opened.method
    if opened.padding_reason:
        config = padded(config)
        train_loader, eval_loader = open_loaders(config, encoder, world_size)
    for line in [*opened.lines, *([note] if note else [])]:
        say(line)
    steps = _count_steps(config, train_loader)
    run_folder = make_run_folder(config)
    write_args(run_folder, config)
    write_environment(run_folder)
    if isinstance(train_loader, BatchLoader) and os.environ.get("RANK", "0") == "0":
        save_data(train_loader, run_folder)
    save_every = max(1, min(500, steps.per_epoch or 500, steps.total))
    arguments = training_arguments(
        config, run_folder, eval_loader, steps.total, save_every, world_size
    )
    if arguments.world_size != world_size:
        raise SftcoreError(
            f"asked for {world_size} processes, but Transformers runs {arguments.world_size}"
        )
    say(_describe_steps(config, steps, world_size, run_folder))
    speed, reporters = MeasureSpeed(), make_loggers(loggers, config, run_folder)
    progress = ShowProgress(lines=config.disable_tqdm)
    trainer = SftTrainer(
        model=model,
        args=arguments,
        train_loader=train_loader,
        eval_loader=eval_loader,
        config=config,
        method=method,
        speed=speed,
        callbacks=[
            speed,
            EvaluateAtEnd(evaluate=eval_loader is not None),
            WriteLedger(train_loader, run_folder),
            WriteLog(run_folder),
            progress,
            *reporters,
        ],
    )
    if config.test_oom:
        trainer.callback_handler.callbacks.insert(0, TryLargest(trainer))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        if config.resume_from_checkpoint:
            checkpoint = Path(config.resume_from_checkpoint)
            train_loader.load_state_dict(
                read_loader_state(checkpoint), allow_data_change=config.allow_data_change
            )
            continue_ledger(checkpoint, run_folder)
        with explain_out_of_memory(speed, config):
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    finally:
        progress.stop()
        for reporter in reporters:
            reporter.stop()
    result = _result(trainer, run_folder, train_loader)
    say(describe_speed(result["speed"]))
    say(f"best checkpoint: {result['best_model_checkpoint']}; curves: {run_folder / 'images'}")
    return result


def _open_encoder(config: TrainConfig, folder: Path) -> Encoder:
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
    return encoder


def _count_steps(config: TrainConfig, loader: BatchLoader | StreamLoader) -> Steps:
    if not isinstance(loader, BatchLoader):
        return Steps(total=config.max_steps, per_epoch=None)
    total = config.max_steps
    if total == -1:
        total = loader.num_steps(config.num_train_epochs)
    return Steps(total=total, per_epoch=loader.steps_per_epoch)


def _describe_steps(config: TrainConfig, steps: Steps, world_size: int, run_folder: Path) -> str:
    micro_batches = config.accumulation_steps(world_size) * world_size
    size = f"{micro_batches * config.per_device_train_batch_size} examples"
    if config.packing:
        size = (
            f"{micro_batches * config.per_device_train_batch_size} packs of up to "
            f"{config.packing_length or config.max_length} tokens"
        )
    elif config.tokens_per_batch:
        size = f"up to {micro_batches * config.tokens_per_batch:,} tokens"
    an_epoch = f", {steps.per_epoch} an epoch" if steps.per_epoch else ""
    return (
        f"steps: {steps.total} of {size}{an_epoch}; learning rate "
        f"{config.effective_learning_rate:g}; output: {run_folder}"
    )


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
        "speed": trainer.speed.summary(trainer.gather),
    }
    if state.is_world_process_zero:
        text = json.dumps(finite(result), ensure_ascii=False, indent=2)
        (run_folder / "result.json").write_text(text, encoding="utf-8")
    return result
