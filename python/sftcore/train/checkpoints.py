"""The checkpoints of a run: written whole or not at all, checked before they are used, linked and rotated.

In goes what the Trainer writes, out come `checkpoint-N` folders. A checkpoint grows in a hidden temporary folder, is
flushed to the disk, and gets its name last; what is removed loses its name first. So a kill, a crash
or a full disk at any moment leaves the last good checkpoint, and at worst a temporary folder, which the next
start or save removes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from sftcore.errors import CheckpointError, first_line
from sftcore.models.shapes import full_size
from sftcore.train.distributed.lost import is_of_peers
from sftcore.train.loaders import say

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

MANIFEST_FILE = "checkpoint.json"
LOADER_STATE = "loader_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVERS = ".checkpoint-*.tmp-*"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint says of itself, in `checkpoint.json`.

    Attributes:
        step: The optimizer steps it has seen.
        saved: When it was written, in seconds since 1970.
        only_model: Whether it lacks the optimizer and the random state.
        world_size: The processes that wrote it.
        versions: The packages that wrote it.
        files: Each other file to its size in bytes.
        unlogged_loss: The sum of the losses of the steps since the last log.
        logged_step: The step of that log.
        unlogged_tally: What else is logged of these steps, as in `Tally.sums`; None where it is nothing.
        evaluation_due: Whether a signal kept the evaluation of its step from being made.
        state_format: How the engine keeps the optimizer, as in `Engine.state_format`.
    """

    step: int
    saved: float
    only_model: bool
    world_size: int
    versions: dict[str, str]
    files: dict[str, int]
    unlogged_loss: float
    logged_step: int
    unlogged_tally: list[list[float]] | None
    evaluation_due: bool
    state_format: str = "plain"


class Checkpoints:
    """The `checkpoint-N` folders of a run folder."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: int | None,
        has_links: bool,
        is_writer: bool,
        wait: Callable[[], object],
    ) -> None:
        """Removes what an earlier run left unfinished.

        Args:
            folder: The run folder.
            limit: How many checkpoints are kept; None or 0 keeps all.
            has_links: Whether `best` and `last` are kept as links.
            is_writer: Whether this process is the one that renames and removes.
            wait: Returns once all processes have called it.
        """
        self.folder = folder
        self.limit = limit
        self.has_links = has_links
        self.is_writer = is_writer
        self.wait = wait
        if is_writer:
            self._remove_leftovers()

    @contextlib.contextmanager
    def writing(self, step: int, num_bytes: Callable[[], int]) -> Iterator[Path]:
        """Gives a folder to write `checkpoint-STEP` into, which gets its name when the block ends well.

        Args:
            step: The optimizer steps seen.
            num_bytes: Returns about how large the checkpoint is, for an error.

        Raises:
            CheckpointError: It could not be written. The checkpoints before it are as they were.
        """
        name = f"checkpoint-{step}"
        parent = self.folder / f".{name}.tmp-saving"
        try:
            if self.is_writer:
                self._remove_leftovers()
                (parent / name).mkdir(parents=True)
            self.wait()
            yield parent / name
            self.wait()
            if self.is_writer:
                flush(parent / name)
                self._remove(self.folder / name)
                (parent / name).rename(self.folder / name)
                _flush_one(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if is_of_peers(error):
                raise
            # safetensors and torch report a failed write with errors of their own
            raise CheckpointError(self._why(name, error, num_bytes())) from error
        finally:
            if self.is_writer:
                shutil.rmtree(parent, ignore_errors=True)
        self.wait()

    def settle(self, step: int, best: str | None) -> None:
        """Points the links at the last and the best checkpoint, then removes those beyond the limit."""
        if not self.is_writer:
            return
        last = self.folder / f"checkpoint-{step}"
        kept = {last} if best is None else {last, Path(best)}
        if self.has_links:
            self._link("last", last)
            if best is not None and Path(best).parent == self.folder:
                self._link("best", Path(best))
        if not self.limit:
            return
        numbered = list_checkpoints(self.folder)
        surplus = len(numbered) - max(self.limit, len(kept & set(numbered.values())))
        oldest_first = [folder for _, folder in sorted(numbered.items()) if folder not in kept]
        try:
            for folder in oldest_first[: max(surplus, 0)]:
                self._remove(folder)
        except OSError as error:
            say(f"warning: a checkpoint beyond --save_total_limit stays: {error}")

    def best_of(self, step: int | None) -> str | None:
        """Returns the checkpoint of the step that evaluated best, where it was saved."""
        folder = self.folder / f"checkpoint-{step}"
        return str(folder) if step and folder.is_dir() else None

    def _remove(self, folder: Path) -> None:
        """Takes a checkpoint its name before its files, so that half of one is never taken for a whole."""
        if folder.is_dir():
            nameless = self.folder / f".{folder.name}.tmp-removed"
            shutil.rmtree(nameless, ignore_errors=True)
            folder.rename(nameless)
            shutil.rmtree(nameless)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(_LEFTOVERS):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)

    def _link(self, name: str, target: Path) -> None:
        link, fresh = self.folder / name, self.folder / f".checkpoint-{name}.tmp-link"
        try:
            fresh.symlink_to(target.name, target_is_directory=True)
            fresh.replace(link)
        except OSError as error:
            self.has_links = False
            say(f"note: no links to the best and the last checkpoint: {link}: {error.strerror}")

    def _why(self, name: str, error: Exception, num_bytes: int) -> str:
        numbered = list_checkpoints(self.folder)
        newest = numbered[max(numbered)].name if numbered else None
        free = shutil.disk_usage(self.folder).free
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        before = (
            f"the checkpoints before it are intact, the newest is {newest}; make room, then pass "
            "--resume_from_checkpoint last"
            if newest
            else "there was none before it; make room, or pass another --output_dir"
        )
        return (
            f"{self.folder / name} could not be saved: {reason}; it takes about {_size(num_bytes)}, "
            f"and {_size(free)} are free there; {before}"
        )


def save_checkpoint(trainer: SftTrainer, save: Callable[[], None]) -> None:
    """Saves the run as it stands.

    Args:
        trainer: Whose run it is.
        save: What the Trainer does to save, into `trainer.saves_into`.

    Raises:
        CheckpointError: The checkpoint could not be written.
    """
    state, checkpoints = trainer.state, trainer.checkpoints
    step = state.global_step
    unlogged = _unlogged(trainer)
    with checkpoints.writing(step, lambda: _num_bytes(trainer)) as folder:
        trainer.saves_into = str(folder.parent)
        try:
            save()
        finally:
            trainer.saves_into = None
        # the Trainer looked for the best checkpoint in the temporary folder
        is_best = state.best_global_step == step
        best = str(checkpoints.folder / f"checkpoint-{step}") if is_best else None
        state.best_model_checkpoint = (
            best or checkpoints.best_of(state.best_global_step) or state.best_model_checkpoint
        )
        trainer.accelerator.wait_for_everyone()
        if checkpoints.is_writer:
            state.save_to_json(str(folder / TRAINER_STATE_NAME))
            _write_manifest(trainer, folder, unlogged)
    checkpoints.settle(step, state.best_model_checkpoint)


def _write_manifest(trainer: SftTrainer, folder: Path, unlogged: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    names = ("sftcore", "torch", "transformers", "peft", "accelerate")
    manifest = Manifest(
        step=trainer.state.global_step,
        saved=time.time(),
        only_model=trainer.args.save_only_model,
        world_size=trainer.engine.world.size,
        versions={name: importlib.metadata.version(name) for name in names},
        files=files,
        evaluation_due=trainer.stopping.evaluation_due,
        state_format=trainer.engine.state_format,
        **unlogged,
    )
    text = json.dumps(asdict(manifest), indent=2)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _unlogged(trainer: SftTrainer) -> dict[str, Any]:
    """Returns what was counted since the last log, over all ranks."""
    reduce, sums = trainer.engine.reduce, trainer.tally.sums
    return {
        "unlogged_loss": float(reduce(trainer._tr_loss, "mean")),
        "logged_step": trainer._globalstep_last_logged,
        "unlogged_tally": None if sums is None else reduce(sums, "sum").tolist(),
    }


def _num_bytes(trainer: SftTrainer) -> int:
    """Returns the size of what is saved, without headers and the small files."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "peft_config")
    saved = [one for one in model.parameters() if one.requires_grad or not is_adapter]
    if not trainer.args.save_only_model:
        states = trainer.optimizer.state.values()
        saved += [
            value for state in states for value in state.values() if isinstance(value, torch.Tensor)
        ]
    return sum(full_size(one) * one.element_size() for one in saved)


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Returns the `checkpoint-N` folders in a run folder by N, whole or not."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(name[1]): path for name, path in found if name and path.is_dir()}


def read_manifest(checkpoint: Path) -> Manifest:
    """Returns what a checkpoint says of itself.

    Raises:
        FileNotFoundError: It has no manifest.
        ValueError: The manifest is none.
    """
    values = read_object(checkpoint / MANIFEST_FILE)
    try:
        return Manifest(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def find_fault(checkpoint: Path) -> str | None:
    """Returns why a run cannot go on from a checkpoint, or None where it can.

    Every file must be there in its full size; weights must have a header that fits them, torch files an
    end, and JSON must be JSON.
    """
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, so it was not written to its end, or not by sftcore"
    except ValueError as error:
        return f"its {MANIFEST_FILE} cannot be read: {error}"
    for name in (LOADER_STATE, TRAINER_STATE_NAME):
        if name not in manifest.files:
            return f"it was written without {name}"
    for name, size in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes; expected {size:,}"
        if fault := _content_fault(path):
            return f"{name} {fault}"
    step = read_object(checkpoint / TRAINER_STATE_NAME).get("global_step")
    if step != manifest.step:
        return f"{TRAINER_STATE_NAME} is of step {step}; expected {manifest.step}"
    return None


def _content_fault(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            return f"is damaged: {error}"
    elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        return "is damaged: it has no end"
    elif path.suffix == ".json":
        try:
            read_object(path)
        except ValueError as error:
            return f"is damaged: {error}"
    return None


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")  # noqa: TRY004
    return value


def flush(folder: Path) -> None:
    """Makes all files and folders of a folder last through a loss of power."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows flushes the entries of a folder by itself
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
