"""Files to batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sftcore import _core
from sftcore.data.encoder import Encoder, available_cores
from sftcore.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Split = Literal["all", "train", "validation"]
Mode = Literal["bucket", "sequential"]


class BatchLoader:
    """Iterates over the micro-batches of one rank, an epoch at a time.

    Each batch is a dict of int64 arrays `[rows, longest]`: `input_ids`, `labels` (-100 off the loss
    mask) and `attention_mask`. The files are indexed when the loader is made, so lengths, steps and
    deleted rows are known before the first batch. A global batch depends on the seed, the epoch and
    its size alone: not on threads, nor on how it is shared among ranks and accumulation steps.
    """

    def __init__(
        self,
        dataset: str | Path | Sequence[str | Path],
        encoder: Encoder,
        *,
        batch_size: int = 1,
        gradient_accumulation_steps: int = 1,
        mode: Mode = "bucket",
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        split: Split = "all",
        split_ratio: float = 0.0,
        on_bad_row: Literal["raise", "skip"] = "raise",
        num_threads: int | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Indexes the files.

        Args:
            dataset: Paths of `.jsonl`, `.json` or `.txt` files; `path#N` draws N rows.
            encoder: Decides ids, masks and lengths.
            batch_size: Examples of a micro-batch.
            gradient_accumulation_steps: Micro-batches of an optimizer step on one rank.
            mode: `bucket` shuffles and puts examples of like length together; `sequential` keeps
                the order of the files.
            seed: Decides the order and the split.
            rank: This process among those that share each global batch.
            world_size: The number of such processes.
            split: `all` rows, or `train` or `validation` by `split_ratio`.
            split_ratio: The share of rows held out for validation, chosen by a hash of the row.
            on_bad_row: `raise` makes a wrong row an error; `skip` leaves it out and counts it in
                `report`.
            num_threads: Threads of the core; None takes all cores.
            return_tensors: `pt` for torch tensors (sharing memory), `np` for numpy arrays.
            progress: Called with bytes done and bytes in all while files are indexed.

        Raises:
            RowError: A row is wrong; it names file, line and column.
            ConfigError: A setting is out of range.
            FileNotFoundError: A file is missing.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ConfigError(f"{name} {value} is out of range: expected 1 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is out of range: expected 0 to {world_size - 1}")
        if not 0 <= split_ratio < 1:
            raise ConfigError(f"split_ratio {split_ratio} is out of range: expected 0 <= ratio < 1")
        paths = [dataset] if isinstance(dataset, str | Path) else list(dataset)
        self._encoder = encoder
        self._index = _core.Dataset(
            [str(path) for path in paths],
            encoder._core,
            num_threads=num_threads or available_cores(),
            seed=seed,
            on_bad_row=on_bad_row,
            progress=progress,
        )
        self._open(
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            mode=mode,
            seed=seed,
            rank=rank,
            world_size=world_size,
            split=split,
            split_ratio=split_ratio,
            return_tensors=return_tensors,
        )

    def _open(
        self, *, split: Split, split_ratio: float, return_tensors: str, **sharing: Any
    ) -> None:
        seed = sharing["seed"]
        self._rows: list[int] = self._index.split_rows(split, split_ratio, seed)
        if not self._rows:
            raise ConfigError(
                f"split {split} with split_ratio {split_ratio} has no rows; the data set has "
                f"{self._index.report['examples']} examples, pass a larger one or --val_dataset"
            )
        self._settings = {"split": split, "split_ratio": split_ratio, **sharing}
        self._return_tensors = return_tensors
        self._accumulation: int = sharing["gradient_accumulation_steps"]
        self._global_batch_size = sharing["batch_size"] * self._accumulation * sharing["world_size"]
        self._batches = self._index.batches(
            self._rows, pad_token_id=self._encoder.pad_token_id, **sharing
        )
        self._epoch = 0
        self._consumed = 0

    def sibling(self, *, split: Split, batch_size: int, mode: Mode = "sequential") -> BatchLoader:
        """Returns a loader of another split of the same files, without indexing them again."""
        other = object.__new__(BatchLoader)
        other._encoder, other._index = self._encoder, self._index
        settings = {
            **self._settings,
            "split": split,
            "batch_size": batch_size,
            "mode": mode,
            "gradient_accumulation_steps": 1,
            "return_tensors": self._return_tensors,
        }
        other._open(**settings)
        return other

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self._encoder

    @property
    def num_rows(self) -> int:
        """Examples of an epoch, over all ranks."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        steps: int = math.ceil(len(self._rows) / self._global_batch_size)
        return steps

    def __len__(self) -> int:
        """Micro-batches of an epoch on this rank."""
        return self.steps_per_epoch * self._accumulation

    @property
    def report(self) -> dict[str, Any]:
        """What the files came to, and what of it this split has.

        `files`, `rows`, `examples`, `tokens`, `trained_tokens`, `longest`, `deleted`,
        `first_deleted`, `truncated`, `first_truncated`, `tools_not_rendered`, `skipped`,
        `first_skipped`, `not_sampled` are of all rows of the files; `split_examples`,
        `split_tokens` and `split_trained_tokens` of this split.
        """
        tokens, trained = self._index.count_tokens(self._rows)
        return {
            **self._index.report,
            "split_examples": len(self._rows),
            "split_tokens": tokens,
            "split_trained_tokens": trained,
        }

    @property
    def fingerprint(self) -> str:
        """A hash of the rows, the encoder and all settings that decide the global batches."""
        deciding = ("mode", "split", "split_ratio", "seed")
        parts = (
            self._index.fingerprint,
            self._encoder.fingerprint,
            self._global_batch_size,
            *(self._settings[name] for name in deciding),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def plan(self, epoch: int) -> list[list[int]]:
        """Returns the global batches of an epoch as row numbers, longest example first in each."""
        return self._batches.plan(epoch)

    def place(self, row: int) -> tuple[Path, int]:
        """Returns the file and line of a row number of `plan`."""
        place = self._index.place(row)
        if place is None:
            raise IndexError(f"row {row} is out of range")
        return place

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin at the start of `epoch`."""
        self._batches.stop()
        self._epoch, self._consumed = epoch, 0

    def state_dict(self) -> dict[str, int | str]:
        """Returns where the loader stands, in a few integers.

        `step` counts the optimizer steps of the epoch that were handed out whole; a state in the
        middle of a step goes on from the beginning of that step.
        """
        return {
            "fingerprint": self.fingerprint,
            "seed": self._settings["seed"],
            "epoch": self._epoch,
            "step": self._consumed // self._accumulation,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes on from a state, also of a run with another number of ranks.

        Raises:
            ConfigError: The data, the tokenizer, the template or the global batch size differ from
                those of the state.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                "the loader state is of other data: the files, the tokenizer, the template, the seed or "
                "the global batch size changed since it was saved; start anew, or restore them"
            )
        self._batches.stop()
        self._epoch = int(state["epoch"])
        self._consumed = int(state["step"]) * self._accumulation
        if self._consumed >= len(self):
            self._epoch, self._consumed = self._epoch + 1, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rest of the epoch; then the next epoch begins.

        Each batch has `input_ids`, `labels` (-100 where nothing is trained) and `attention_mask`,
        int64, and `loss_weights`, float32, where a message in it has a weight other than 0 or 1.
        All have the shape `[examples, longest]`.
        """
        convert = _converter(self._return_tensors)
        self._batches.start(self._epoch, self._consumed)
        try:
            while (arrays := self._batches.next_batch()) is not None:
                self._consumed += 1
                names = ("input_ids", "labels", "attention_mask", "loss_weights")
                yield {
                    name: convert(array)
                    for name, array in zip(names, arrays, strict=True)
                    if array is not None
                }
            self._epoch, self._consumed = self._epoch + 1, 0
        finally:
            self._batches.stop()


def _converter(return_tensors: str) -> Callable[[NDArray[Any]], Any]:
    if return_tensors == "np":
        return lambda array: array
    from torch import from_numpy  # only here: the data side runs without torch installed

    return from_numpy
