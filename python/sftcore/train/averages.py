"""Weights that an optimizer keeps as an average of those it has passed through."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class UseAverage(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Evaluates and saves the averaged weights of a schedule-free optimizer, not those it takes gradients at.

    It comes last, when all others have said whether a step evaluates or saves; the next micro-batch goes back.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Puts the averaged weights into the model."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            given["optimizer"].eval()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Puts the averaged weights into the model."""
        self.on_step_end(args, state, control, **given)
