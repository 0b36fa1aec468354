"""`transformers.Trainer`, fed by the Rust core.

The loaders are raw: already sharded by rank, never prepared by accelerate, and the one for training runs over
all epochs, so that every optimizer step takes one global batch of the plan. The loss of a step
is the mean over the trained tokens of that global batch (Transformers counts them over micro-batches and ranks),
and the evaluation loss is the mean over the trained tokens of the whole evaluation set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, StreamLoader
from sftcore.data.run import LEDGER_FILE, save_tokenizer
from sftcore.errors import ConfigError
from sftcore.models.checkpointing import activations_of
from sftcore.train.method import LossMethod
from sftcore.train.output import write_args
from sftcore.train.tally import Tally
from sftcore.tuners import set_learning_rates, tuner_loss, tuner_numbers

LOADER_STATE = "loader_state.json"


class _Stream(IterableDataset[dict[str, torch.Tensor]]):
    """The batches of a loader: one epoch, or epoch after epoch without end."""

    def __init__(self, loader: BatchLoader | StreamLoader, *, endless: bool) -> None:
        super().__init__()
        self.loader = loader
        self.endless = endless

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
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
        **arguments: Any,
    ) -> None:
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self.config = config
        self.method = method
        train_stream = _Stream(train_loader, endless=True)
        super().__init__(train_dataset=train_stream, eval_dataset=eval_loader and [], **arguments)
        # the loss below divides by num_items_in_batch
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.tally = Tally(train_loader)

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
            # the count is that of all ranks, and gradients are averaged over them
            loss = loss * self.accelerator.num_processes
        added = tuner_loss(self.model)
        if added is not None:
            # with its gradient and without its value, so that the loss of a log is that of tokens
            loss = loss + (added - added.detach()) / self.current_gradient_accumulation_steps
        self.tally.add(inputs, losses)
        return (loss, losses) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Gives parameters of a tuner their own learning rates."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            set_learning_rates(optimizer, self.model, self.config)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the accuracy of trained tokens and, where there are several data sets, the loss of each."""
        if "loss" in logs:
            logs |= self.tally.take(self.accelerator.reduce) | tuner_numbers(self.model)
        super().log(logs, start_time)

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
        """Loss and accuracy over all trained tokens, not a mean of means; weights do not enter."""
        model = self.model
        model.eval()
        # loss, right tokens, tokens, examples
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                inputs.pop("loss_weights", None)
                found, _ = self.method.losses(model, inputs)
                examples = len(inputs["rows"])
                sums += torch.stack(
                    [
                        found.losses.double().sum(),
                        found.right.sum().double(),
                        torch.tensor(float(len(found.losses))).to(sums),
                        torch.tensor(float(examples)).to(sums),
                    ]
                )
        loss, right, count, examples = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / count,
            f"{metric_key_prefix}_token_acc": right / count,
        }
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=int(examples)
        )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        save_tokenizer(self.train_loader.encoder, folder)
        write_args(folder, self.config)
        # the Trainer has drawn just the batches it trained, so this is where the next run goes on
        state = json.dumps(self.train_loader.state_dict(), indent=2)
        (folder / LOADER_STATE).write_text(state, encoding="utf-8")
        ledger = Path(self.args.output_dir) / LEDGER_FILE
        if ledger.is_file():
            shutil.copyfile(ledger, folder / LEDGER_FILE)


def read_loader_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the loader state of a checkpoint.

    Raises:
        ConfigError: It has none.
    """
    path = checkpoint / LOADER_STATE
    if not path.is_file():
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint} has no {LOADER_STATE}; expected a checkpoint-N folder of sftcore"
        )
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state
