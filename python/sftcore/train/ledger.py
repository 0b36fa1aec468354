"""The ledger of a run: what each optimizer step saw, written as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.data import BatchLoader, StreamLoader, append_ledger
from sftcore.data.run import LEDGER_FILE


class WriteLedger(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Appends what each step saw to the ledger of the run."""

    def __init__(self, loader: BatchLoader | StreamLoader, folder: Path) -> None:
        self.loader = loader
        self.folder = folder

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Appends a line; every rank knows all of the step, so one of them writes."""
        entries = self.loader.take_ledger()
        if state.is_world_process_zero:
            append_ledger(self.folder / LEDGER_FILE, entries)
