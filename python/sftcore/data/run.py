"""The data of a run, kept with it, so that what a step saw can be looked up later without a GPU or the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sftcore.data.encoder import Encoder
from sftcore.data.ledger import LedgerEntry, read_ledger
from sftcore.data.loader import BatchLoader
from sftcore.errors import ConfigError

DATA_FILE = "data.json"
LEDGER_FILE = "ledger.jsonl"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenRow:
    """One example of an optimizer step.

    Attributes:
        row: Its row number.
        source: The name of its data set.
        path: Its file.
        line: Its line there.
        raw: The row as it stands in the file.
        text: The rendered text.
    """

    row: int
    source: str
    path: Path
    line: int
    raw: bytes
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenStep:
    """What an optimizer step saw.

    Attributes:
        epoch: Its epoch, from 0.
        step: Its number within the epoch, from 0.
        steps: The steps of that epoch.
        rows: Its examples, over all ranks.
        recorded: What the ledger of the run says of it; None where the run did not come so far.
        hash: The hash of the examples as they are now.
    """

    epoch: int
    step: int
    steps: int
    rows: list[SeenRow]
    recorded: LedgerEntry | None
    hash: str


def save_tokenizer(encoder: Encoder, folder: Path) -> None:
    """Copies the tokenizer of an encoder, with the template that it renders."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        source = encoder.folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if encoder.has_chat_template:
        (folder / "chat_template.jinja").write_text(encoder.chat_template, encoding="utf-8")
    if encoder.tool_use_template is not None:
        named = folder / "additional_chat_templates"
        named.mkdir(exist_ok=True)
        (named / "tool_use.jinja").write_text(encoder.tool_use_template, encoding="utf-8")


def save_data(loader: BatchLoader, folder: Path) -> None:
    """Writes what is needed to open the same loader again."""
    save_tokenizer(loader.encoder, folder / TOKENIZER_FOLDER)
    description = {"encoder": loader.encoder.settings, "loader": loader.settings}
    temporary = folder / f"{DATA_FILE}.tmp"
    temporary.write_text(json.dumps(description, ensure_ascii=False, indent=2), encoding="utf-8")
    os.replace(temporary, folder / DATA_FILE)  # noqa: PTH105


def open_data(folder: Path, *, progress: Callable[[int, int], object] | None = None) -> BatchLoader:
    """Opens the loader of a run again.

    Raises:
        ConfigError: The folder is not that of a run.
        RowError: A file is not as it was.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {DATA_FILE}; expected the folder of a run (output/MODEL/vN-TIME) that was not streamed"
        )
    description = json.loads(path.read_text(encoding="utf-8"))
    encoder = Encoder.from_settings(folder / TOKENIZER_FOLDER, description["encoder"])
    return BatchLoader.from_settings(description["loader"], encoder, progress=progress)


def look_up_step(
    folder: Path, step: int, *, progress: Callable[[int, int], object] | None = None
) -> SeenStep:
    """Returns what optimizer step `step` of a run saw, counted from 1 over all epochs.

    Raises:
        ConfigError: The folder is not that of a run, or the step is below 1.
        RowError: A row of the step is not as it was.
    """
    if step < 1:
        raise ConfigError(f"--step {step} is out of range: steps count from 1")
    loader = open_data(folder, progress=progress)
    epoch, within = 0, step - 1
    while within >= (steps := loader.num_steps_of(epoch)):
        within -= steps
        epoch += 1
    rows = []
    for row in (row for pack in loader.global_batch(epoch, within) for row in pack):
        path, line = loader.place(row)
        raw, text = loader.row(row)
        rows.append(
            SeenRow(row=row, source=loader.source_of(row), path=path, line=line, raw=raw, text=text)
        )
    ledger = folder / LEDGER_FILE
    entries = read_ledger(ledger) if ledger.is_file() else []
    recorded = [entry for entry in entries if (entry.epoch, entry.step) == (epoch, within)]
    return SeenStep(
        epoch=epoch,
        step=within,
        steps=steps,
        rows=rows,
        recorded=recorded[0] if recorded else None,
        hash=loader.step_hash(epoch, within),
    )
