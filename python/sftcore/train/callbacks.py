"""What a run shows: a progress bar or lines, `logging.jsonl`, and curves."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
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


class WriteLog(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Appends each log to `logging.jsonl` and draws the curves at each save and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Appends a line."""
        if state.is_world_process_zero:
            line = json.dumps({"step": state.global_step, **(logs or {})}, ensure_ascii=False)
            with (self.folder / "logging.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draws what there is so far."""
        if state.is_world_process_zero:
            draw_loss(state.log_history, self.folder / "images" / "loss.png")


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


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss, smoothed and as it was, and the evaluation loss over steps."""
    from matplotlib.figure import Figure  # a run that draws nothing does not load it

    train = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
    held_out = [
        (entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry
    ]
    if not train and not held_out:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training loss")
        smooth = [losses[0]]
        for loss in losses[1:]:
            smooth.append(0.8 * smooth[-1] + 0.2 * loss)
        axes.plot(steps, smooth, color="tab:blue", label="training loss, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="evaluation loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean loss of a trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
