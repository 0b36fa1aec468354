"""`train`: from a configuration to a tuned model."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, set_seed

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, StreamLoader
from sftcore.data.run import save_data
from sftcore.models import quieten, resolve_model
from sftcore.models.vocabulary import check_vocabulary
from sftcore.train.arguments import training_arguments
from sftcore.train.best import check_evaluation, copy_best, meeting_note
from sftcore.train.distributed import Engine, choose_engine, read_world
from sftcore.train.distributed.lost import explain_lost_peers
from sftcore.train.dry_run import dry_run, without_files
from sftcore.train.early_stopping import StopEarly
from sftcore.train.encoder import open_encoder
from sftcore.train.largest import TryLargest, explain_out_of_memory
from sftcore.train.ledger import WriteLedger
from sftcore.train.loaders import describe_data, open_loaders, say
from sftcore.train.lock import RunLock
from sftcore.train.log import WriteLog, finite
from sftcore.train.loggers import choose_loggers, make_loggers
from sftcore.train.open import open_model, padded
from sftcore.train.optimizers import choose_optimizer
from sftcore.train.output import make_run_folder, write_args, write_environment
from sftcore.train.progress import ShowProgress
from sftcore.train.proofs import Proof, as_dicts, describe_proofs, proofs_at_end, proofs_at_start
from sftcore.train.resume import (
    GoOn,
    Resume,
    finish,
    prepare_folder,
    read_loader_state,
)
from sftcore.train.schedule import EvaluateAtEnd, FollowEpochs, Steps, count_steps
from sftcore.train.schedulers import check_schedule, warmup_note
from sftcore.train.speed import MeasureSpeed, describe_speed
from sftcore.train.stopping import StopOnSignal
from sftcore.train.trainer import SftTrainer
from sftcore.tuners import tuner_callbacks


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains as `config` says.

    Returns:
        `best_model_checkpoint`, `last_model_checkpoint`, `best_metric` (that of
        `best_model_checkpoint`, None without evaluation), `global_step`, `log_history`, `output_dir`, `data` (the
        report of the loader), `speed` (seconds, tokens, rates, shares and `memory_gib`), and `proved` (what was
        checked, with `name`, `outcome`, `detail` and `value`). With `dry_run`, the plan.

    Raises:
        SftcoreError: A setting, a row, the template or the tokenizer is wrong. Nothing is written
            before all of these are known to be right.
        StoppedError: SIGTERM or Ctrl-C ended the run; it is saved.
        CheckpointError: A checkpoint could not be written, as where the disk is full.
        PeerError: Another process of the run ended or hangs.
    """
    quieten()
    choose_optimizer(config)  # a wrong one is said before any data is read
    check_schedule(config)
    world = read_world(config)
    with (
        closing(RunLock()) as lock,
        explain_lost_peers(world),
        choose_engine(config, world) as engine,
        ExitStack() as stack,
    ):
        if config.new_special_tokens:
            engine.check_new_tokens()
        if config.dry_run:
            return _dry_run(without_files(config), engine)
        return _train(config, engine, lock, stack)


def _dry_run(config: TrainConfig, engine: Engine) -> dict[str, Any]:
    choose_loggers(config)
    folder = resolve_model(config.model, weights=False)
    with open_encoder(config, folder) as (encoder, new_tokens):
        loaders = open_loaders(config, encoder, engine.world)
        say(describe_data(*loaders))
        set_seed(config.seed)
        return dry_run(config, folder, encoder, loaders, engine, new_tokens)


def _train(config: TrainConfig, engine: Engine, lock: RunLock, stack: ExitStack) -> dict[str, Any]:
    loggers, note = choose_loggers(config)
    resume = engine.from_first(lambda: lock.find_resume(config, engine))
    folder = resolve_model(config.model, weights=True)
    encoder, new_tokens = stack.enter_context(open_encoder(config, folder))
    train_loader, eval_loader = open_loaders(config, encoder, engine.world)
    say(describe_data(train_loader, eval_loader))
    set_seed(config.seed)
    opened = open_model(config, folder, engine, new_tokens)
    if opened.padding_reason:
        config = padded(config, engine.world.data_size)
        train_loader, eval_loader = open_loaders(config, encoder, engine.world)
    proofs = proofs_at_start(opened, train_loader, config, engine)
    engine.share(opened.model)
    unknown = check_vocabulary(encoder, opened.model.config)
    for line in (engine.describe(), *opened.lines, note, unknown):
        if line:
            say(line)
    check_evaluation(config, eval_loader)
    steps = count_steps(config, train_loader)
    of_tuner = tuner_callbacks(opened.model, config, steps.total)
    if resume and resume.manifest:
        state = read_loader_state(resume.checkpoint)
        train_loader.load_state_dict(state, allow_data_change=config.allow_data_change)
    run_folder = engine.from_first(
        lambda: _begin_folder(config, resume, train_loader, engine, lock)
    )
    save_every = max(1, min(500, steps.per_epoch or 500, steps.total))
    arguments = training_arguments(config, run_folder, eval_loader, steps.total, save_every, engine)
    say(_describe_steps(config, steps, engine.world.data_size, run_folder))
    if warmup := warmup_note(config, steps.total):
        say(warmup)
    if eval_loader and (meeting := meeting_note(config, int(arguments.save_steps), steps.total)):
        say(meeting)
    stopping = StopOnSignal(world_size=engine.world.size)
    speed = MeasureSpeed(engine.peak_memory)
    reporters = make_loggers(loggers, config, run_folder)
    progress = ShowProgress(lines=config.disable_tqdm)
    trainer = engine.trainer_class()(
        model=opened.model,
        args=arguments,
        train_loader=train_loader,
        eval_loader=eval_loader,
        config=config,
        method=opened.method,
        engine=engine,
        stopping=stopping,
        resume=resume,
        speed=speed,
        new_tokens=new_tokens,
        callbacks=[
            FollowEpochs(train_loader),  # the first: others read the epoch
            speed,
            EvaluateAtEnd(evaluate=eval_loader is not None),
            WriteLedger(train_loader, run_folder),
            WriteLog(run_folder),
            progress,
            *of_tuner,
            *_early_stopping(config),
            *reporters,
            stopping,  # the last: it overrules what others ask for
        ],
    )
    engine.check(trainer)
    if config.test_oom:
        trainer.callback_handler.callbacks.insert(0, TryLargest(trainer))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        if engine.world.is_first:
            prepare_folder(resume, run_folder)
        with stopping, explain_out_of_memory(speed, config):
            _run(trainer, resume, steps.total)
    finally:
        progress.stop()
        for reporter in reporters:
            reporter.stop()
    step = trainer.state.global_step
    stopping.raise_if_stopped(str(run_folder / f"checkpoint-{step}"), step, steps.total)
    return _finish(trainer, run_folder, proofs)


def _begin_folder(
    config: TrainConfig,
    resume: Resume | None,
    loader: BatchLoader | StreamLoader,
    engine: Engine,
    lock: RunLock,
) -> Path:
    """Makes the run folder, with what there is to know of the run before its first step."""
    run_folder = (resume and resume.run_folder) or make_run_folder(config)
    lock.hold(run_folder)
    write_args(run_folder, config)
    write_environment(run_folder, engine.world)
    if isinstance(loader, BatchLoader):
        save_data(loader, run_folder)
    return run_folder


def _finish(trainer: SftTrainer, run_folder: Path, proofs: list[Proof]) -> dict[str, Any]:
    """Says and writes what a run that came to its end has reached, and what of it was checked."""
    proofs = [*proofs, *proofs_at_end(trainer)]
    result = _result(trainer, run_folder, trainer.train_loader, proofs)
    if trainer.config.load_best_model_at_end and trainer.is_world_process_zero():
        copy_best(Path(result["best_model_checkpoint"]), run_folder)
    say(describe_speed(result["speed"]))
    say(describe_proofs(proofs))
    say(f"best checkpoint: {result['best_model_checkpoint']}; curves: {run_folder / 'images'}")
    return result


def _run(trainer: SftTrainer, resume: Resume | None, max_steps: int) -> None:
    """Trains from the first step, or from a checkpoint on."""
    if resume is None:
        trainer.train()
        return
    checkpoint = str(resume.checkpoint)
    if resume.manifest is None:
        say(f"going on with the weights of {checkpoint}, from step 0")
        trainer._load_from_checkpoint(checkpoint)
        trainer.train()
        return
    if resume.step >= max_steps:
        say(
            f"nothing is left to train: {checkpoint} has all {max_steps} steps; raise --num_train_epochs or "
            "--max_steps to go on"
        )
        finish(trainer, resume)
        return
    say(f"going on from {checkpoint}, after step {resume.step} of {max_steps}")
    trainer.add_callback(GoOn(trainer, resume))
    trainer.train(resume_from_checkpoint=checkpoint)


def _early_stopping(config: TrainConfig) -> list[StopEarly]:
    if config.early_stop_interval is None:
        return []
    threshold = config.early_stopping_threshold
    return [StopEarly(interval=config.early_stop_interval, threshold=threshold)]


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
    trainer: SftTrainer,
    run_folder: Path,
    train_loader: BatchLoader | StreamLoader,
    proofs: list[Proof],
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
        "proved": as_dicts(proofs),
    }
    if state.is_world_process_zero:
        text = json.dumps(finite(result), ensure_ascii=False, indent=2)
        (run_folder / "result.json").write_text(text, encoding="utf-8")
    return result
