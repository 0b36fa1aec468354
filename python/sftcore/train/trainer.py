"""`transformers.Trainer`, fed by the Rust core.

The loaders are raw: already sharded by rank, never prepared by accelerate, and the one for training runs over
all epochs, so that every optimizer step takes one global batch of the plan. The loss of a step
is the mean over the trained tokens of that global batch (Transformers counts them over micro-batches and ranks),
and the evaluation loss is the mean over the trained tokens of the whole evaluation set.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, StreamLoader
from sftcore.data.run import LEDGER_FILE, save_tokenizer
from sftcore.models.checkpointing import activations_of
from sftcore.models.generation import plain_generation
from sftcore.models.new_tokens import NewTokens, write_new_tokens
from sftcore.models.stops import write_generation_config
from sftcore.train.checkpoints import LOADER_STATE, Checkpoints, save_checkpoint
from sftcore.train.distributed.engine import Engine
from sftcore.train.evaluate import Evaluator
from sftcore.train.finite import FiniteGuard
from sftcore.train.loaders import say
from sftcore.train.method import LossMethod
from sftcore.train.optimizers import make_optimizer
from sftcore.train.output import write_args
from sftcore.train.resume import Resume, fitting, restore_optimizer
from sftcore.train.speed import MeasureSpeed
from sftcore.train.stopping import LeaveEvaluation, StopOnSignal
from sftcore.train.tally import Tally
from sftcore.tuners import tuner_loss, tuner_numbers


class _Stream(IterableDataset[dict[str, torch.Tensor]]):
    """The batches of a loader: one epoch, or epoch after epoch without end."""

    def __init__(
        self,
        loader: BatchLoader | StreamLoader,
        *,
        endless: bool,
        speed: MeasureSpeed | None = None,
    ) -> None:
        super().__init__()
        self.loader = loader
        self.endless = endless
        self.speed = speed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.speed.watch(self._batches()) if self.speed else self._batches()

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.loader
        while self.endless:
            yield from self.loader


class SftTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A Trainer whose data is a `BatchLoader`."""

    def __init__(
        self,
        *,
        train_loader: BatchLoader | StreamLoader,
        eval_loader: BatchLoader | None,
        config: TrainConfig,
        method: LossMethod,
        engine: Engine,
        speed: MeasureSpeed,
        stopping: StopOnSignal,
        resume: Resume | None = None,
        new_tokens: NewTokens | None = None,
        **arguments: Any,
    ) -> None:
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self.config = config
        self.method = method
        self.engine = engine
        self.speed = speed
        self.stopping = stopping
        self.resume = resume
        self.new_tokens = new_tokens
        # the temporary folder of a checkpoint that is being saved
        self.saves_into: str | None = None
        train_stream = _Stream(train_loader, endless=True, speed=speed)
        super().__init__(train_dataset=train_stream, eval_dataset=eval_loader and [], **arguments)
        if self.accelerator.ddp_handler is not None:
            # gradients lie in what DDP sends, not beside it
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.checkpoints = Checkpoints(
            Path(self.args.output_dir),
            limit=config.save_total_limit,
            has_links=config.create_checkpoint_symlink,
            is_writer=self.args.should_save,
            wait=self.accelerator.wait_for_everyone,
        )
        # the loss below divides by num_items_in_batch
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.tally = Tally(train_loader)
        folder = Path(self.args.output_dir)
        self.finite = FiniteGuard(
            loader=train_loader,
            method=method,
            accelerator=self.accelerator,
            engine=engine,
            folder=folder,
            skips=config.on_non_finite == "skip",
        )
        self.evaluator = (
            Evaluator(config, eval_loader, method, engine, self.args.device, folder)
            if eval_loader
            else None
        )

    def get_batch_samples(self, *arguments: Any) -> Any:
        """The micro-batches of a step, which are known if their loss is not finite."""
        batches, num_items = super().get_batch_samples(*arguments)
        if num_items is not None:
            num_items = self.engine.global_tokens(num_items)
        self.finite.begin(batches, num_items)
        return batches, num_items

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """The loss of a micro-batch, 0 where it is not finite."""
        return self.finite.note(super().training_step(*arguments, **named))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = self.finite.check(
            model,
            super()._get_grad_norm(model, grad_norm),
            step=self.state.global_step,
            logged_step=self._globalstep_last_logged,
        )
        if self.finite.is_skipped:
            self._tr_loss -= self.finite.skipped_loss()
        return norm

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # a number is the best only where the weights that it is of are saved
        is_saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if not is_saved or self.args.metric_for_best_model not in metrics:
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum over the trained tokens of a micro-batch over their number in the whole global batch.

        Where tokens have weights, it is the sum of weighted losses over the number of trained tokens,
        so that a weight of 2 counts twice and does not change what other tokens count.
        """
        with activations_of(self.config, model.parameters):
            losses, extra = self.method.losses(model, inputs)
        count = num_items_in_batch if num_items_in_batch is not None else max(1, len(losses.losses))
        loss = losses.total / count
        if extra is not None:
            # a loss of the model's own is a mean over the micro-batch
            loss = loss + extra / self.current_gradient_accumulation_steps
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the count is that of all ranks, and gradients are averaged over some or all of them
            loss = loss * self.engine.gradient_ranks
        added = tuner_loss(self.model)
        if added is not None:
            # with its gradient and without its value, so that the loss of a log is that of tokens
            loss = loss + (added - added.detach()) / self.current_gradient_accumulation_steps
        self.tally.add(inputs, losses)
        return (loss, losses) if return_outputs else loss

    def take_gradients(self, batch: dict[str, Any]) -> None:
        """Runs a micro-batch forward and backward by itself, as in a step."""
        inputs = self._prepare_inputs(dict(batch))
        with self.compute_loss_context_manager():
            count = torch.tensor(max(1, int((batch["labels"][:, 1:] != -100).sum())))
            loss = self.compute_loss(
                self.model_wrapped, inputs, num_items_in_batch=count.to(self.args.device)
            )
        self.accelerator.backward(loss)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Any:
        """The optimizer that the settings name, whose parameter groups they shape."""
        if self.optimizer is None:
            made, line = make_optimizer(self, model or self.model, self.config)
            self.optimizer: Any = made
            say(line)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, the loss of each data set where there are several, and how fast the run goes."""
        logs = self.finite.amend(logs, self.state.global_step)
        if "loss" in logs:
            logs |= self.tally.take(self.engine.reduce) | tuner_numbers(self.model)
            logs |= self.speed.take(self.gather, self.state)
        super().log(logs, start_time)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Joins a tensor of every rank along its first dimension."""
        return self.engine.gather(values.to(self.args.device))

    def get_train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """The micro-batches of this rank, epoch after epoch."""
        # a DataLoader draws a seed when it is iterated; from the global generator, that would change the
        # dropout of a resumed run
        return DataLoader(self.train_dataset, batch_size=None, generator=torch.Generator())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, torch.Tensor]]:  # noqa: ARG002
        """The evaluation batches of this rank, in the order of the files."""
        assert self.eval_loader is not None
        self.eval_loader.set_epoch(0)
        return DataLoader(
            _Stream(self.eval_loader, endless=False), batch_size=None, generator=torch.Generator()
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[dict[str, torch.Tensor]],
        description: str,  # noqa: ARG002
        prediction_loss_only: bool | None = None,  # noqa: ARG002
        ignore_keys: list[str] | None = None,  # noqa: ARG002
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss, accuracy and answers over the whole evaluation set."""
        assert self.evaluator is not None
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # a schedule-free optimizer keeps the weights to evaluate apart
        batches = (self._prepare_inputs(batch) for batch in dataloader)
        found, num_examples = self.evaluator.evaluate(self.model, batches, self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=num_examples
        )

    def _get_output_dir(self, trial: Any) -> str:
        return self.saves_into or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        save_checkpoint(self, functools.partial(super()._save_checkpoint, model, trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *rest: Any, **named: Any) -> None:
        load = super()._load_from_checkpoint
        assert self.resume is not None
        fitting(functools.partial(load, resume_from_checkpoint, *rest, **named), self.resume)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resume is not None:
            restore_optimizer(self, self.resume, functools.partial(self.load_state, checkpoint))

    def load_state(self, checkpoint: str | None) -> None:
        """Loads optimizer and scheduler."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self.config.resume_only_model:
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.config.resume_only_model:
            super()._load_rng_state(checkpoint)

    def _evaluate(self, *arguments: Any, **named: Any) -> Any:
        with self.stopping.evaluating():
            return super()._evaluate(*arguments, **named)

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*arguments, **named)
        except LeaveEvaluation:
            self.stopping.leave_evaluation(self.control)
            super()._maybe_log_save_evaluate(*arguments, **named)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with plain_generation(self.model):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        encoder = self.train_loader.encoder
        save_tokenizer(encoder, folder)
        write_generation_config(folder, home=encoder.folder, trained=encoder.stop_token_ids)
        if self.new_tokens is not None and not self.config.trains_weights:
            write_new_tokens(folder, self.new_tokens)
        write_args(folder, self.config)
        # the Trainer has drawn just the batches it trained, so this is where the next run goes on
        state = json.dumps(self.train_loader.state_dict(), indent=2)
        (folder / LOADER_STATE).write_text(state, encoding="utf-8")
        ledger = Path(self.args.output_dir) / LEDGER_FILE
        if ledger.is_file():
            shutil.copyfile(ledger, folder / LEDGER_FILE)
