"""The largest micro-batch first, and what to do where memory does not suffice.

`TryLargest` runs the largest micro-batch of the plan forward and backward before the first step, beside memory
held for the state of the optimizer, throws its gradients away and puts every random state and the loader back, so that
the run is the same bit for bit. `explain_out_of_memory` turns what torch says where memory runs out
into the shape of the batch and what to lower.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader
from sftcore.errors import ConfigError, SftcoreError, first_line
from sftcore.train.loaders import say
from sftcore.train.speed import MeasureSpeed, peak_memory

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

# epochs are shuffled anew, and their largest batches are nearly equal
_SEARCHED_EPOCHS = 8
_CPU_MESSAGES = ("not enough memory", "can't allocate memory", "DefaultCPUAllocator")


class TryLargest(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Runs the largest micro-batch of the plan before the first step."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Runs it; the model is in the hands of its engine by now."""
        loader = self.trainer.train_loader
        assert isinstance(loader, BatchLoader)
        if self.trainer.is_deepspeed_enabled:
            raise ConfigError(
                "--test_oom has no effect on DeepSpeed, which counts the batch as one of the run; leave it out"
            )
        epochs = max(1, -(-state.max_steps // max(loader.steps_per_epoch, 1)))
        epoch, number = find_largest(loader, min(epochs, _SEARCHED_EPOCHS))
        batch = read_batch(loader, epoch, number)
        rows, width = batch["input_ids"].shape
        with explain_out_of_memory([(rows, width)], self.trainer.config):
            run_batch(self.trainer, batch)
        say(
            f"memory: the largest micro-batch, {rows:,} x {width:,} tokens, fits; the peak was "
            f"{peak_memory() / 2**30:.2f} GiB"
        )


def find_largest(loader: BatchLoader, epochs: int) -> tuple[int, int]:
    """Returns the epoch and the number of the micro-batch with the most places, and of these the longest rows."""
    best, found = (-1, -1), (0, 0)
    for epoch in range(epochs):
        shapes = loader.shapes(epoch)
        slots = shapes[:, 1] * shapes[:, 2]
        place = int(np.lexsort((shapes[:, 2], slots))[-1])
        size = int(slots[place]), int(shapes[place, 2])
        if size > best:
            best, found = size, (epoch, place)
    return found


def read_batch(loader: BatchLoader, epoch: int, number: int) -> dict[str, Any]:
    """Returns micro-batch `number` of an epoch; the loader stands where it stood."""
    state = loader.state_dict()
    step = int(loader.shapes(epoch)[number, 0])
    first = number - number % (len(loader) // loader.steps_per_epoch)
    loader.load_state_dict({**state, "epoch": epoch, "step": step})
    batches = iter(loader)
    for _ in range(number - first):
        next(batches)
    batch: dict[str, Any] = next(batches)
    batches.close()  # type: ignore[attr-defined]
    loader.load_state_dict(state)
    return batch


def run_batch(trainer: SftTrainer, batch: dict[str, Any]) -> None:
    """Runs a micro-batch forward and backward as a step would, and leaves nothing of it behind."""
    model = trainer.model_wrapped
    was_training = model.training
    model.train()
    held = _optimizer_memory(trainer)
    # the Trainer sets it anew at each step
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    with random_states_kept(trainer.args.device):
        # the gradients of earlier micro-batches are there when later ones run
        for _ in range(min(2, trainer.args.gradient_accumulation_steps)):
            trainer.take_gradients(batch)
    trainer.tally.sums = None
    model.zero_grad()
    model.train(was_training)
    del held


def _optimizer_memory(trainer: SftTrainer) -> list[Tensor]:
    """Returns tensors as large as the state that the optimizer will have, where it has none yet."""
    if trainer.args.device.type != "cuda" or trainer.optimizer is None or trainer.optimizer.state:
        return []
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return [torch.empty_like(parameter) for parameter in trained for _ in range(2)]


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Puts the random states of Python, NumPy and torch back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_devices = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if of_devices:
            torch.cuda.set_rng_state_all(of_devices)


@contextmanager
def explain_out_of_memory(
    shapes: Sequence[tuple[int, int]] | MeasureSpeed, config: TrainConfig
) -> Iterator[None]:
    """Says which batch did not fit, and what to lower.

    Args:
        shapes: The rows and widths of the micro-batches that are run, or what knows those of the step under way.
        config: The settings of the run.

    Raises:
        SftcoreError: Memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        known = shapes.shapes if isinstance(shapes, MeasureSpeed) else shapes
        rows, width = max(known, key=lambda shape: (shape[0] * shape[1], shape[1]), default=(0, 0))
        raise SftcoreError(
            f"out of memory with a micro-batch of {rows:,} x {width:,} tokens: {'; or '.join(remedies(config, rows))} "
            f"({first_line(error)})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in _CPU_MESSAGES)


def remedies(config: TrainConfig, rows: int) -> list[str]:
    """Returns what lowers the memory of a run, what changes least first."""
    found = []
    if not config.gradient_checkpointing:
        found.append("take --gradient_checkpointing true")
    if config.loss_impl == "plain":
        found.append("take --loss_impl chunked")
    if config.tokens_per_batch:
        found.append(f"lower --tokens_per_batch (now {config.tokens_per_batch:,})")
    elif rows > 1 or config.per_device_train_batch_size > 1:
        found.append(
            f"lower --per_device_train_batch_size (now {config.per_device_train_batch_size}) and raise "
            "--gradient_accumulation_steps by as much"
        )
    found.append(f"lower --max_length (now {config.max_length:,})")
    if config.trains_weights:
        found.append("take --tuner_type lora")
    elif config.torch_dtype == "float32":
        found.append("take --torch_dtype auto")
    return found
