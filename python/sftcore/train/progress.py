"""What a run shows while it goes: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "eval_token_acc": "token accuracy {:.3f}",
    "grad_norm": "grad norm {:.2f}",
    "learning_rate": "lr {:.2e}",
}


class ShowProgress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A bar on a terminal, a line for each log elsewhere."""

    def __init__(self, *, lines: bool, trained_tokens_per_step: float | None) -> None:
        self.console = Console(stderr=True, no_color="NO_COLOR" in os.environ, highlight=False)
        self.lines = lines or not sys.stderr.isatty()
        self.trained_tokens_per_step = trained_tokens_per_step
        self.progress: Progress | None = None
        self.started = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the bar."""
        self.started = (time.monotonic(), state.global_step)
        if self.lines or not state.is_world_process_zero:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[log]}"),
            console=self.console,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, log=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Moves the bar."""
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Shows the newest numbers."""
        shown = [
            text.format(float(logs[name])) for name, text in _SHOWN.items() if logs and name in logs
        ]
        if not shown or not state.is_world_process_zero:
            return
        seconds, steps = time.monotonic() - self.started[0], state.global_step - self.started[1]
        if steps and self.trained_tokens_per_step and "loss" in (logs or {}):
            shown.append(f"{steps * self.trained_tokens_per_step / seconds:,.0f} trained tokens/s")
        text = ", ".join(shown)
        if self.progress:
            self.progress.update(self.task, log=text)
        if not self.progress or any(name.startswith("eval") for name in logs or ()):
            self.console.print(
                f"step {state.global_step}/{state.max_steps}: {text}", soft_wrap=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends the bar."""
        self.stop()

    def stop(self) -> None:
        """Ends the bar, also after an error."""
        if self.progress:
            self.progress.stop()
            self.progress = None
