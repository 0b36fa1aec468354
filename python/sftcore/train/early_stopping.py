"""When a run need not go on.

In come the evaluations in the log of the Trainer, which is part of each checkpoint; so the count of those that
were no better is the same in a resumed run, and nothing has to be kept beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.train.loaders import say


class StopEarly(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Stops, saved, after some evaluations in a row that were no better than the best before them."""

    def __init__(self, *, interval: int, threshold: float) -> None:
        self.interval = interval
        self.threshold = threshold

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts, and asks for the end."""
        name = str(args.metric_for_best_model)
        # an evaluation may stand twice at the step where a run was resumed
        by_step = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
        found = without_improvement(
            list(by_step.values()), greater=bool(args.greater_is_better), threshold=self.threshold
        )
        if found < self.interval or state.global_step >= state.max_steps:
            return
        control.should_training_stop = True
        control.should_save = True
        numbers = [value for value in by_step.values() if math.isfinite(value)]
        best = (max if args.greater_is_better else min)(numbers, default=math.nan)
        say(
            f"stopped after step {state.global_step} of {state.max_steps}: {name} has not been better by more than "
            f"{self.threshold:g} in {found} evaluations; the best was {best:.4f}"
        )


def without_improvement(values: Sequence[float], *, greater: bool, threshold: float) -> int:
    """Returns how many of the last values were not better by more than `threshold` than the best before them.

    Args:
        values: In the order of the steps; NaN is never better.
        greater: Whether higher is better.
        threshold: Not below 0.
    """
    sign = 1.0 if greater else -1.0
    best = -math.inf
    count = 0
    for value in values:
        if sign * value - best > threshold:
            best, count = sign * value, 0
        else:
            count += 1
    return count
