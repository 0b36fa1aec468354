"""What the epochs of a loader take, known from the index alone: rows, steps, sizes and places.

In comes the index with the plan of its batches; out go numbers, without any example being prepared. Each answer is for
all ranks, unless it says that it is for this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftcore.data.report import build_report
from sftcore.data.specs import digest
from sftcore.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sftcore import _core
    from sftcore.data.encoder import Encoder
    from sftcore.data.sources import DatasetSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """A row that another loader has too.

    Attributes:
        row: Its number.
        other: The number of its like in the other loader.
        is_exact: Whether ids, mask and weights are equal; else the texts are nearly so.
    """

    row: int
    other: int
    is_exact: bool


class EpochPlan:
    """The rows and optimizer steps of each epoch of a `BatchLoader`, which fills in its attributes."""

    _encoder: Encoder
    _index: _core.Dataset
    _sources: Sequence[DatasetSource]
    # what the index says of all rows of the files
    _report: dict[str, Any]
    # those of the split, without the ones that are left out
    _rows: _core.RowSets
    _batches: _core.Batches
    # what the batches were opened with
    _settings: dict[str, Any]
    _accumulation: int
    _overlaps: list[Overlap]
    _left_out: list[int]
    # the epoch that is handed out, or comes next
    _epoch: int
    _fingerprints: dict[str, str] | None

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self._encoder

    @property
    def num_rows(self) -> int:
        """Examples of the split, over all ranks."""
        return len(self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the epoch that comes next."""
        return self._batches.num_steps(self._epoch)

    def num_steps_of(self, epoch: int) -> int:
        """Returns the optimizer steps of an epoch."""
        return self._batches.num_steps(epoch)

    def num_steps(self, num_epochs: float) -> int:
        """Returns the optimizer steps of so many epochs, exactly, also where epochs differ."""
        whole = math.floor(num_epochs)
        if self._settings["mix"] is None:
            return math.ceil(self._batches.num_steps(0) * num_epochs)
        steps = sum(self._batches.num_steps(epoch) for epoch in range(whole))
        rest = num_epochs - whole
        return steps + (math.ceil(self._batches.num_steps(whole) * rest) if rest else 0)

    @property
    def report(self) -> dict[str, Any]:
        """What the files came to, and what of it this split has.

        Of all rows of the files: `files`, `rows`, `examples`, `tokens`, `trained_tokens`, `longest`, `deleted`,
        `truncated`, `split` (each also as `first_…`), `untrained_pieces`, `untrained`, `bad` with `bad_reasons` and
        `first_bad`, `lost` (what the chat template leaves out: `kind`, `count`, `rows` and `first` of each), `lossy`
        (rows left out for that), `endless_turns` (trained, and no token that stops generation at their end) with
        `first_endless`, `tools_not_rendered`, `control_tokens_in_content`, `duplicates`, `near_duplicates`,
        `not_drawn`, `notes`, and `sets`, the same for each data set. Of this split: `split_examples`, `split_tokens`,
        `split_trained_tokens` and `epoch`, the examples, tokens and trained tokens of each data set in the next epoch.
        `overlap` counts rows that the validation loader has too (`first_overlap` names one), `origin` says
        where the index came from: `built`, `memo`, or `shared` with another process.
        """
        return build_report(
            self._report,
            self._sources,
            split=self._index.count(self._rows),
            epoch=self._batches.count(self._epoch),
            extra={
                "overlap": len(self._overlaps),
                "first_overlap": self._overlaps[0].row if self._overlaps else None,
                "left_out": len(self._left_out),
                "origin": self._index.origin,
            },
        )

    @property
    def overlaps(self) -> list[Overlap]:
        """The rows that the validation loader has too."""
        return self._overlaps

    @property
    def fingerprint(self) -> str:
        """A hash of the rows, the encoder and all settings that decide the global batches."""
        return digest(*self._parts().values())

    def _parts(self) -> dict[str, str]:
        """Hashes of what decides the global batches, by what a user could have changed."""
        if self._fingerprints is None:
            settings = self._settings
            deciding = (
                "mode",
                "pack_length",
                "split",
                "split_ratio",
                "mix",
                "mix_by",
                "stopping_strategy",
            )
            micro_batches = self._accumulation * settings["world_size"]
            tokens = settings["tokens_per_batch"]
            size = (tokens, micro_batches) if tokens else settings["batch_size"] * micro_batches
            self._fingerprints = {
                "data": f"{self._index.fingerprint(self._rows):016x}",
                "encoder": self._encoder.fingerprint,
                "batches": digest(size, *(settings[name] for name in (*deciding, "seed"))),
            }
        return self._fingerprints

    def global_batch(self, epoch: int, step: int) -> list[list[int]]:
        """Returns the rows of an optimizer step over all ranks, those that share a row of the batch together.

        Raises:
            ConfigError: The epoch has no such step.
        """
        found = self._batches.global_batch(epoch, step)
        if found is None:
            steps = self._batches.num_steps(epoch)
            raise ConfigError(f"step {step} is out of range: epoch {epoch} has {steps} steps")
        return found

    def plan(self, epoch: int) -> Iterator[list[int]]:
        """Yields the rows of each optimizer step of an epoch."""
        for step in range(self._batches.num_steps(epoch)):
            yield [row for pack in self.global_batch(epoch, step) for row in pack]

    def shapes(self, epoch: int) -> NDArray[np.int64]:
        """Returns the size of each micro-batch of this rank in an epoch, in order, without preparing any.

        Int64 `[micro-batches, 5]`: its optimizer step, rows, width, tokens without padding, trained tokens.
        """
        return self._batches.shapes(epoch)

    def lengths(self, epoch: int) -> NDArray[np.int64]:
        """Returns the tokens of each example of an epoch, over all ranks, in no set order, int64 `[examples]`."""
        return self._batches.lengths(epoch)

    def place(self, row: int) -> tuple[Path, int]:
        """Returns the file and line of a row number."""
        place = self._index.place(row)
        if place is None:
            raise IndexError(f"row {row} is out of range")
        return place

    def row(self, row: int) -> tuple[bytes, str]:
        """Returns a row as it stands in its file, and its rendered text."""
        return self._index.text(row)

    def source_of(self, row: int) -> str:
        """Returns the name of the data set of a row number."""
        return self._sources[self._index.set_of(row)].name

    def step_hash(self, epoch: int, step: int) -> str:
        """Encodes the rows of an optimizer step again and returns the hash of what they are, as the ledger has it.

        Raises:
            RowError: A row has changed since the files were indexed.
        """
        total = sum(
            self._index.verify(row) for pack in self.global_batch(epoch, step) for row in pack
        )
        return f"{total % 2**64:016x}"
