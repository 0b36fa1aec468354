"""What a run leaves of its numbers: `logging.jsonl` and curves.

Every log of the Trainer becomes one line of JSON, appended in one write, so that a run that is killed leaves whole
lines and at most one torn end, which the next run closes. A run that goes on in a new folder begins with the lines of
the run before, so that the file holds the whole history.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.train.curves import draw_curves

LOG_FILE = "logging.jsonl"


class WriteLog(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Appends each log to `logging.jsonl` and draws the curves at each save and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drawn = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes what was logged before, where the file does not have it."""
        path = self.folder / LOG_FILE
        if state.is_world_process_zero and state.log_history and not path.is_file():
            for entry in state.log_history:
                append_line(path, entry)

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
            append_line(self.folder / LOG_FILE, {"step": state.global_step, **(logs or {})})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draws what there is so far."""
        points = sum(is_point(entry) for entry in state.log_history)
        if not state.is_world_process_zero or points == self.drawn:
            return
        try:
            draw_curves(state.log_history, self.folder / "images")
            self.drawn = points
        except OSError as error:
            # pictures can be drawn again from logging.jsonl; a run is not lost for them
            print(f"warning: the curves could not be written: {error}", file=sys.stderr)  # noqa: T201

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draws the whole run."""
        self.on_save(args, state, control)


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Appends an object to a file of JSON lines; numbers that are not finite become "NaN", "Infinity", "-Infinity"."""
    line = json.dumps(finite(entry), ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                line = "\n" + line  # the run before was killed in the middle of a line
        file.write(line.encode())


def finite(value: Any) -> Any:
    """Returns a value that JSON can hold: strings stand for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def is_point(entry: dict[str, Any]) -> bool:
    """Returns whether a log has something to draw."""
    return "loss" in entry or any(name.startswith("eval_") for name in entry)
