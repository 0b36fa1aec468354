"""What a run shows while it goes: two lines that stay in place on a terminal, a line for each log elsewhere.

In come the logs of the Trainer; what is shown of them is fitted to the width of the terminal, the least important
numbers being left out first. Evaluations are printed above the bar and stay.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.train.speed import clock

# how a log is printed as a line, in this order
_LINE = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad norm {:.2f}",
    "learning_rate": "lr {:.2e}",
    "token_acc": "token accuracy {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "trained_tokens_per_second": "{:,.0f} trained tokens/s",
    "padding_share": "padding {:.1%}",
    "data_wait_share": "data wait {:.1%}",
    "memory_gib": "{:.2f} GiB",
}
# what evaluation says of itself and not of the model
_OF_EVALUATION = ("runtime", "per_second", "model_preparation_time")


class TrainingBar:
    """Two lines: how far a run is, and its newest numbers."""

    def __init__(self, total: int, completed: int = 0) -> None:
        self.total = total
        self.completed = completed
        self.logs: dict[str, float] = {}
        self.logged_at = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws both lines for the width that there is."""
        width = options.max_width
        yield self._first_line(width)
        yield Text(fit(self._numbers(width), width), no_wrap=True, overflow="crop")

    def _first_line(self, width: int) -> Table:
        left = f"step {self.completed:,}/{self.total:,}"
        share = f"{self.completed / max(self.total, 1):4.0%}"
        right = [share]
        if "seconds_per_step" in self.logs and width >= 70:
            right.append(f"{self.logs['seconds_per_step']:.3g} s/step")
        if "memory_gib" in self.logs and width >= 60:
            right.append(f"{self.logs['memory_gib']:.1f} GiB")
        if "eta_seconds" in self.logs:
            left_over = self.logs["eta_seconds"] - (time.monotonic() - self.logged_at)
            right.append(f"ETA {clock(left_over)}")
        else:
            right.append("ETA -:--:--")
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=self.total, completed=self.completed)
        row.add_row(left, bar, "  ".join(right))
        return row

    def _numbers(self, width: int) -> list[tuple[int, str]]:
        """Returns what the second line may hold, each with its rank: 0 is left out last."""
        is_wide = width >= 100
        kinds = {
            "loss": (0, "loss {:.4f}"),
            "learning_rate": (1, "lr {:.2e}" if is_wide else "lr {:.1e}"),
            "token_acc": (6, "token acc {:.3f}" if is_wide else "acc {:.3f}"),
            "grad_norm": (7, "grad norm {:.2f}"),
        }
        shown = [
            (rank, text.format(self.logs[name]))
            for name, (rank, text) in kinds.items()
            if name in self.logs
        ]
        if "tokens_per_second" in self.logs:
            shown += [
                (2, f"{short(self.logs['tokens_per_second'])} tok/s"),
                (3, f"{short(self.logs['trained_tokens_per_second'])} trained"),
                (4, f"{'padding' if is_wide else 'pad'} {self.logs['padding_share']:.1%}"),
                (5, f"{'data wait' if is_wide else 'wait'} {self.logs['data_wait_share']:.1%}"),
            ]
        return shown


class ShowProgress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A bar on a terminal, a line for each log elsewhere."""

    def __init__(self, *, lines: bool, console: Console | None = None) -> None:
        self.console = console or Console(
            stderr=True, no_color="NO_COLOR" in os.environ, highlight=False
        )
        is_terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.lines = lines or not is_terminal
        self.bar: TrainingBar | None = None
        self.live: Live | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the bar."""
        if self.lines or not state.is_world_process_zero:
            return
        self.bar = TrainingBar(state.max_steps, state.global_step)
        self.live = Live(self.bar, console=self.console, refresh_per_second=4)
        self.live.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Moves the bar."""
        if self.bar:
            self.bar.completed = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Shows the newest numbers."""
        if not state.is_world_process_zero or not logs:
            return
        place = f"step {state.global_step}/{state.max_steps}: "
        evaluated = describe_evaluation(logs)
        if evaluated:
            self.console.print(place + evaluated, soft_wrap=True)
        if "loss" not in logs:
            return
        if self.bar:
            self.bar.logs = {
                name: float(value) for name, value in logs.items() if isinstance(value, float | int)
            }
            self.bar.logged_at = time.monotonic()
        else:
            self.console.print(place + describe_log(logs), soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends the bar."""
        self.stop()

    def stop(self) -> None:
        """Ends the bar, also after an error."""
        if self.live:
            self.live.stop()
            self.live = self.bar = None
            sys.stderr.flush()


def describe_log(logs: dict[str, Any]) -> str:
    """Returns the numbers of a training log in a line."""
    shown = [text.format(float(logs[name])) for name, text in _LINE.items() if name in logs]
    if "eta_seconds" in logs:
        shown.append(f"ETA {clock(logs['eta_seconds'])}")
    return ", ".join(shown)


def describe_evaluation(logs: dict[str, Any]) -> str:
    """Returns the metrics of an evaluation in a line; nothing where `logs` are of another kind."""
    metrics = {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in logs.items()
        if name.startswith("eval_")
        and isinstance(value, float | int)
        and not name.endswith(_OF_EVALUATION)
    }
    return ", ".join(f"eval {name} {value:.4g}" for name, value in metrics.items())


def short(number: float) -> str:
    """Returns a number in at most five characters: 987, 12.3k, 4.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size * 0.99995:
            unit = 1e3 if letter == "k" else size
            return (
                f"{number / unit:.1f}{letter}"
                if number < 100 * unit
                else f"{number / unit:.0f}{letter}"
            )
    return f"{number:,.0f}"


def fit(ranked: list[tuple[int, str]], width: int, gap: str = "  ") -> str:
    """Joins texts, leaving out those of the highest ranks until the line has no more than `width` characters."""
    kept = list(ranked)
    while len(line := gap.join(text for _, text in kept)) > width and len(kept) > 1:
        kept.remove(max(kept, key=lambda pair: pair[0]))
    return line
