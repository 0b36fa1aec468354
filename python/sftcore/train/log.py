"""What a run leaves of its numbers: `logging.jsonl` and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.train.curves import draw_loss


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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draws the whole run."""
        self.on_save(args, state, control)
