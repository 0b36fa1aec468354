"""How many steps a run has, and when it evaluates and saves beyond its regular ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, StreamLoader


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The optimizer steps of a run.

    Attributes:
        total: All of them.
        per_epoch: Those of the first epoch; None where a stream does not know.
    """

    total: int
    per_epoch: int | None


def count_steps(config: TrainConfig, loader: BatchLoader | StreamLoader) -> Steps:
    """Returns how many optimizer steps a run has."""
    if not isinstance(loader, BatchLoader):
        return Steps(total=config.max_steps, per_epoch=None)
    total = config.max_steps
    if total == -1:
        total = loader.num_steps(config.num_train_epochs)
    return Steps(total=total, per_epoch=loader.steps_per_epoch)


class FollowEpochs(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Counts the epochs of the data, and asks at their ends for what the strategies named `epoch` want.

    To the Trainer the batches are one stream without end, so its own epochs are the whole run. Of a `StreamLoader`,
    which does not know the length of an epoch, the epoch stays the share of the run that is done.
    """

    def __init__(self, loader: BatchLoader | StreamLoader) -> None:
        self.loader = loader

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Sets the epoch; comes before those who read it."""
        if not isinstance(self.loader, BatchLoader):
            state.epoch = state.global_step / state.max_steps
            return
        place = self.loader.state_dict()
        epoch, step = int(place["epoch"]), int(place["step"])
        num_steps = self.loader.num_steps_of(epoch)
        state.epoch = epoch + step / num_steps
        if step == num_steps:
            control.should_log |= args.logging_strategy == "epoch"
            is_due = epoch + 1 >= args.eval_delay
            control.should_evaluate |= args.eval_strategy == "epoch" and is_due
            control.should_save |= args.save_strategy == "epoch"


class EvaluateAtEnd(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Evaluates and saves after the last step too, so that the last checkpoint can be the best.

    A run that ends early is saved too, and nothing is done twice at one step.
    """

    def __init__(self, *, evaluate: bool) -> None:
        self.evaluate = evaluate
        self.evaluated_step = 0
        self.saved_step = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for both at the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.evaluate
            control.should_save = True
            control.should_log = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Notes the step."""
        self.evaluated_step = state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Notes the step."""
        self.saved_step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Saves a run that ended between two checkpoints; the Trainer's epoch is the whole run."""
        if self.evaluated_step == state.global_step:
            control.should_evaluate = False
        control.should_save = self.saved_step != state.global_step
