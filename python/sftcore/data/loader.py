"""Files to batches."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sftcore import _core
from sftcore.config.folders import cache_folder
from sftcore.data.batches import Mode, check_sharing, converter, named
from sftcore.data.encoder import Encoder, available_cores
from sftcore.data.ledger import START, LedgerEntry, link
from sftcore.data.plan import EpochPlan, Overlap
from sftcore.data.sources import DatasetSource, resolve_sources
from sftcore.data.specs import Dataset, is_stdin, listed, registered_shares, specs_of
from sftcore.errors import ConfigError

Split = Literal["all", "train", "validation"]


class BatchLoader(EpochPlan):
    """Iterates over the micro-batches of one rank, an epoch at a time.

    Each batch is a dict of arrays: `input_ids` and `labels` (-100 off the loss mask), int64 `[rows, longest]`,
    and `attention_mask`, or, where examples share rows, `position_ids` and `cu_seqlens`. The files are indexed when
    the loader is made, so lengths, steps and deleted rows are known before the first batch. A global batch
    depends on the seed, the epoch and its size alone: not on threads, nor on how it is shared
    among ranks and accumulation steps.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Dataset],
        encoder: Encoder,
        *,
        batch_size: int = 1,
        tokens_per_batch: int | None = None,
        gradient_accumulation_steps: int = 1,
        mode: Mode = "bucket",
        pack_length: int | None = None,
        padding_free: bool = False,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        split: Split = "all",
        split_ratio: float = 0.0,
        mix: Sequence[float] | None = None,
        mix_by: Literal["rows", "tokens"] = "rows",
        stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted",
        dedup: Literal["none", "exact", "near"] = "none",
        validation: BatchLoader | None = None,
        overlap: Literal["none", "exact", "near"] = "exact",
        columns: Mapping[str, str] | None = None,
        dataset_info: Sequence[str | Path] = (),
        on_bad_row: Literal["raise", "skip", "quarantine"] = "raise",
        quarantine: str | Path | None = None,
        max_bad_rows: str | int | None = None,
        cache: bool = True,
        hash_whole_files: bool = False,
        quadratic_cost: float = 1 / (6 * 4096),
        num_threads: int | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        return_rows: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Indexes the files.

        Args:
            dataset: Files, folders, globs, names of the registry, hub ids or URLs; `#N` at the end draws N rows.
            encoder: Decides ids, masks and lengths.
            batch_size: Examples of a micro-batch, or packs in mode `pack`.
            tokens_per_batch: In place of `batch_size`: as many examples as give no more tokens, padding included.
            gradient_accumulation_steps: Micro-batches of an optimizer step on one rank.
            mode: `bucket` shuffles and puts examples of like length together; `pack` puts several examples into
                one row, best fit over the whole epoch, anew each epoch; `sequential` keeps the order of the files.
            pack_length: Tokens of a pack; the encoder's `max_length` where not given.
            padding_free: One row for a whole micro-batch, without padding.
            seed: Decides the order and the split.
            rank: This process among those that share each global batch.
            world_size: The number of such processes.
            split: `all` rows, or `train` or `validation` by `split_ratio`.
            split_ratio: The share of rows held out for validation, chosen by a hash of the example, so that a row
                stays on its side when others are added.
            mix: The share of each data set in an epoch; without shares an epoch is all rows once.
            mix_by: What the shares are of: `rows`, or trained `tokens`.
            stopping_strategy: An epoch of a mix ends when the first data set is used up, or when all are and the
                smaller ones have come again.
            dedup: Leaves out rows that are equal (`exact`) or also nearly equal (`near`) to an earlier one, and rows
                that occur in `validation`.
            validation: A loader of the rows to evaluate on; rows that it shares with this one are reported.
            overlap: Which such rows are looked for.
            columns: New names of keys: `{"a": "query"}`.
            dataset_info: Files with data sets of your own, by name.
            on_bad_row: `raise` makes a wrong row an error; `skip` leaves it out and counts it in `report`;
                `quarantine` also writes it to a file.
            quarantine: That file.
            max_bad_rows: How many rows may be wrong: a number, or a share like `0.1%`.
            cache: Keeps the index for later starts and other processes of the node.
            hash_whole_files: Tells files apart by all of their bytes, not by size, time and parts.
            quadratic_cost: The cost of an example of L tokens, which is balanced over ranks, is L + this · L².
            num_threads: Threads of the core; None takes all cores.
            return_tensors: `pt` for torch tensors (sharing memory), `np` for numpy arrays.
            return_rows: Adds `rows` to each batch: the row number of each example.
            progress: Called with bytes done and bytes in all while files are indexed.

        Raises:
            RowError: A row is wrong; it names file, line and column.
            ConfigError: A setting is out of range or has no effect.
            FileNotFoundError: A file is missing.
        """
        check_sharing(batch_size, tokens_per_batch, gradient_accumulation_steps, rank, world_size)
        if not 0 <= split_ratio < 1:
            raise ConfigError(f"split_ratio {split_ratio} is out of range: expected 0 <= ratio < 1")
        if max_bad_rows is not None and on_bad_row == "raise":
            raise ConfigError(
                "max_bad_rows has no effect with on_bad_row raise; choose skip or quarantine"
            )
        self._sources = resolve_sources(listed(dataset), dataset_info=dataset_info, columns=columns)
        mix = mix or registered_shares(self._sources)
        if mix is None and (mix_by != "rows" or stopping_strategy != "first_exhausted"):
            raise ConfigError("mix_by and stopping_strategy have no effect without mix")
        self._encoder = encoder
        if any(is_stdin(source) for source in self._sources):
            raise ConfigError(
                "stdin cannot be read twice, so it has no index; use a StreamLoader (--streaming true)"
            )
        self._index = _core.Dataset(
            specs_of(self._sources),
            encoder._core,
            encoder_fingerprint=encoder.fingerprint,
            num_threads=num_threads or available_cores(),
            seed=seed,
            on_bad_row=on_bad_row,
            quarantine=None if quarantine is None else Path(quarantine),
            max_bad_rows=None if max_bad_rows is None else str(max_bad_rows),
            dedup=dedup,
            cache_folder=cache_folder() if cache else None,
            hash_whole_files=hash_whole_files,
            progress=progress,
        )
        self._index_settings = {
            "dedup": dedup,
            "on_bad_row": "raise" if on_bad_row == "raise" else "skip",
            "hash_whole_files": hash_whole_files,
        }
        self._report: dict[str, Any] = json.loads(self._index.report())
        self._overlaps: list[Overlap] = []
        self._left_out: list[int] = []
        self._open(
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            gradient_accumulation_steps=gradient_accumulation_steps,
            mode=mode,
            pack_length=pack_length,
            padding_free=padding_free,
            seed=seed,
            rank=rank,
            world_size=world_size,
            split=split,
            split_ratio=split_ratio,
            mix=None if mix is None else [float(share) for share in mix],
            mix_by=mix_by,
            stopping_strategy=stopping_strategy,
            quadratic_cost=quadratic_cost,
            return_tensors=return_tensors,
            return_rows=return_rows,
        )
        if validation is not None and overlap != "none":
            self._overlaps = self.overlap(validation, near=overlap == "near", progress=progress)
            if dedup != "none" and self._overlaps:
                self._left_out = [found.row for found in self._overlaps]
                self._open(**self._settings)

    def _open(self, **settings: Any) -> None:
        self._settings = settings
        split, ratio, seed = settings["split"], settings["split_ratio"], settings["seed"]
        sets = self._index.split(split, ratio, seed)
        self._rows = sets.without(self._left_out) if self._left_out else sets
        if self._left_out and not len(self._rows):
            raise ConfigError(
                f"all {len(sets):,} rows also stand in the evaluation data, and dedup {self._index_settings['dedup']} "
                "leaves them out; evaluate on other rows, or leave out --dedup"
            )
        if not len(self._rows):
            raise ConfigError(
                f"split {split} with split_ratio {ratio} has no rows; the data set has "
                f"{self._report['total']['examples']} examples, pass a larger one or --val_dataset"
            )
        self._accumulation: int = settings["gradient_accumulation_steps"]
        self._batches = self._index.batches(
            self._rows,
            mode=settings["mode"],
            batch_size=settings["batch_size"],
            tokens_per_batch=settings["tokens_per_batch"],
            gradient_accumulation_steps=self._accumulation,
            rank=settings["rank"],
            world_size=settings["world_size"],
            seed=seed,
            pad_token_id=self._encoder.pad_token_id,
            shares=settings["mix"],
            mix_by=settings["mix_by"],
            stopping_strategy=settings["stopping_strategy"],
            pack_length=self._capacity(settings),
            padding_free=settings["padding_free"],
            quadratic_cost=settings["quadratic_cost"],
        )
        self._epoch = 0
        self._consumed = 0
        self._chain = START
        self._entries: list[LedgerEntry] = []
        self._fingerprints: dict[str, str] | None = None

    def _capacity(self, settings: Mapping[str, Any]) -> int | None:
        length: int | None = settings["pack_length"]
        if settings["mode"] != "pack":
            if length is not None:
                raise ConfigError('pack_length has no effect without mode "pack"')
            return None
        if settings["tokens_per_batch"] is not None:
            raise ConfigError(
                "tokens_per_batch has no effect on packs, which have pack_length tokens; set batch_size"
            )
        longest: int = self._report["total"]["longest"]
        if length is None:
            limit = self._encoder.max_length
            return limit if limit < 2**31 else longest
        if length < longest:
            raise ConfigError(
                f"pack_length {length} is out of range: the longest example has {longest} tokens; raise it, or lower "
                "max_length"
            )
        return length

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        encoder: Encoder,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> BatchLoader:
        """Opens a loader again from its `settings`."""
        dataset = [
            DatasetSource(**{**source, "files": tuple(Path(path) for path in source["files"])})
            for source in settings["dataset"]
        ]
        loader = cls(
            dataset,
            encoder,
            **settings["index"],
            **settings["batches"],
            return_tensors="np",
            progress=progress,
        )
        if settings["left_out"]:
            loader._left_out = list(settings["left_out"])
            loader._open(**loader._settings)
        return loader

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which rows each step takes, to be written as JSON and given to `from_settings`."""
        shown = ("return_tensors", "return_rows")
        return {
            "dataset": [
                {
                    "name": source.name,
                    "files": [str(path.absolute()) for path in source.files],
                    "sample": source.sample,
                    "columns": dict(source.columns),
                }
                for source in self._sources
            ],
            "index": self._index_settings,
            "batches": {name: value for name, value in self._settings.items() if name not in shown},
            "left_out": self._left_out,
        }

    def sibling(self, *, split: Split, batch_size: int, mode: Mode = "sequential") -> BatchLoader:
        """Returns a loader of another split of the same files, without indexing them again."""
        other = object.__new__(BatchLoader)
        other._encoder, other._index = self._encoder, self._index
        other._sources, other._report = self._sources, self._report
        other._index_settings, other._overlaps, other._left_out = self._index_settings, [], []
        other._open(
            **{
                **self._settings,
                "split": split,
                "batch_size": batch_size,
                "tokens_per_batch": None,
                "mode": mode,
                "pack_length": None,
                "mix": None,
                "mix_by": "rows",
                "stopping_strategy": "first_exhausted",
                "gradient_accumulation_steps": 1,
            }
        )
        return other

    def overlap(
        self,
        other: BatchLoader,
        *,
        near: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Overlap]:
        """Returns the rows of this loader that occur in another, near-duplicates too where `near`."""
        found = self._index.overlap(
            self._rows, other._index, other._rows, near=near, progress=progress
        )
        return [Overlap(row=row, other=twin, is_exact=exact) for row, twin, exact in found]

    def __len__(self) -> int:
        """Micro-batches on this rank of the epoch that comes next."""
        return self.steps_per_epoch * self._accumulation

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin at the start of `epoch`."""
        self._batches.stop()
        self._epoch, self._consumed = epoch, 0

    def state_dict(self) -> dict[str, int | str]:
        """Returns where the loader stands, in a few integers and hashes.

        `step` counts the optimizer steps of the epoch that were handed out whole; a state in the
        middle of a step goes on from the beginning of that step. `ledger` is the chain of all steps so far.
        """
        return {
            "fingerprint": self.fingerprint,
            **self._parts(),
            "rows": self.num_rows,
            "seed": self._settings["seed"],
            "epoch": self._epoch,
            "step": self._consumed // self._accumulation,
            "ledger": self._chain,
        }

    def load_state_dict(
        self, state: Mapping[str, int | str], *, allow_data_change: bool = False
    ) -> None:
        """Goes on from a state, also of a run with another number of ranks.

        Args:
            state: What `state_dict` returned.
            allow_data_change: Goes on at the same epoch and step although the data or how it is encoded changed,
                with a warning: rows may come twice in that epoch or not at all.

        Raises:
            ConfigError: The data, the tokenizer, the template or the global batch size differ from
                those of the state.
        """
        changes = self._changes(state)
        if changes and not allow_data_change:
            raise ConfigError(
                f"the loader state is of other data: {'; '.join(changes)}; restore what changed, start anew, or pass "
                "--allow_data_change true to go on at the same step with what there is now"
            )
        if changes:
            warnings.warn(
                f"going on although {'; '.join(changes)}: rows of this epoch may come twice or not at all",
                stacklevel=2,
            )
        self._batches.stop()
        self._epoch = int(state["epoch"])
        self._consumed = int(state["step"]) * self._accumulation
        self._chain = str(state["ledger"])
        self._entries = []
        if self._consumed >= len(self):
            self._epoch, self._consumed = self._epoch + 1, 0

    def _changes(self, state: Mapping[str, int | str]) -> list[str]:
        texts = {
            "data": f"the rows changed ({state['rows']:,} examples then, {self.num_rows:,} now)",
            "encoder": "the tokenizer, the chat template or a setting of the encoder (max_length, …) changed",
            "batches": "the seed, the global batch size, the mode, the split or the mix changed",
        }
        now = self._parts()
        return [text for name, text in texts.items() if state[name] != now[name]]

    def take_ledger(self) -> list[LedgerEntry]:
        """Returns the optimizer steps that were handed out whole since this was last called."""
        entries, self._entries = self._entries, []
        return entries

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rest of the epoch; then the next epoch begins.

        Each batch has `input_ids` and `labels` (-100 where nothing is trained), int64, and `loss_weights`,
        float32, where a message in it has a weight other than 0 or 1, all `[rows, longest]`; `attention_mask` of the
        same shape, or, where examples share rows, `position_ids` of that shape and `cu_seqlens`, int32
        `[examples + 1]`, the place of each example in the flattened batch (padding counts as one).
        """
        convert = converter(self._settings["return_tensors"])
        step, begun = divmod(self._consumed, self._accumulation)
        self._batches.start(self._epoch, step)
        try:
            while (found := self._batches.next_batch()) is not None:
                if begun:
                    # of a step that was left in its middle, what was handed out is passed over
                    begun -= 1
                    continue
                arrays, rows, step_hash = found
                if step_hash is not None:
                    self._chain = link(self._chain, step_hash)
                    step = self._consumed // self._accumulation
                    entry = LedgerEntry(
                        epoch=self._epoch,
                        step=step,
                        examples=f"{step_hash:016x}",
                        chain=self._chain,
                    )
                    self._entries.append(entry)
                self._consumed += 1
                yield named(arrays, rows if self._settings["return_rows"] else None, convert)
            self._epoch, self._consumed = self._epoch + 1, 0
        finally:
            self._batches.stop()
