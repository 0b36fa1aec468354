"""When a run evaluates and saves beyond its regular steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EvaluateAtEnd(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Evaluates and saves after the last step too, so that the last checkpoint can be the best."""

    def __init__(self, *, evaluate: bool) -> None:
        self.evaluate = evaluate

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for both at the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.evaluate
            control.should_save = True
            control.should_log = True
