"""Files too long to index, and pipes, to batches."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sftcore import _core
from sftcore.data.batches import Mode, check_sharing, converter, named
from sftcore.data.encoder import Encoder, available_cores
from sftcore.data.ledger import START, LedgerEntry, link
from sftcore.data.sources import resolve_sources
from sftcore.data.specs import Dataset, digest, is_stdin, listed, registered_shares, specs_of
from sftcore.errors import ConfigError


class StreamLoader:
    """Iterates over the micro-batches of one rank of data that is read in order, without an index.

    The first batch comes as soon as one window of rows is read. There is no length and no split, and rows are
    shuffled within a window alone; where the files can be indexed, a `BatchLoader` is better. Every rank reads the
    whole stream and takes its share of each global batch.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Dataset],
        encoder: Encoder,
        *,
        shuffle_buffer_size: int = 10_000,
        batch_size: int = 1,
        tokens_per_batch: int | None = None,
        gradient_accumulation_steps: int = 1,
        mode: Mode = "bucket",
        pack_length: int | None = None,
        padding_free: bool = False,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        mix: Sequence[float] | None = None,
        stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted",
        columns: Mapping[str, str] | None = None,
        dataset_info: Sequence[str | Path] = (),
        on_bad_row: Literal["raise", "skip", "quarantine"] = "raise",
        quarantine: str | Path | None = None,
        max_bad_rows: str | int | None = None,
        quadratic_cost: float = 1 / (6 * 4096),
        num_threads: int | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        return_rows: bool = False,
    ) -> None:
        """Opens the stream; nothing is read yet.

        Args:
            dataset: As for a `BatchLoader`; `-` is the standard input. `#N` has no meaning here.
            encoder: Decides ids, masks and lengths.
            shuffle_buffer_size: Examples of a window: they are shuffled and batched together.
            batch_size: Examples of a micro-batch, or packs in mode `pack`.
            tokens_per_batch: In place of `batch_size`: as many examples as give no more tokens, padding included.
            gradient_accumulation_steps: Micro-batches of an optimizer step on one rank.
            mode: `bucket`, `pack` or `sequential`, within a window.
            pack_length: Tokens of a pack; the encoder's `max_length` where not given.
            padding_free: One row for a whole micro-batch, without padding.
            seed: Decides the order.
            rank: This process among those that share each global batch.
            world_size: The number of such processes.
            mix: The share of rows of each data set; without shares one comes after the other.
            stopping_strategy: An epoch of a mix ends when the first data set is used up, or when all are.
            columns: New names of keys.
            dataset_info: Files with data sets of your own, by name.
            on_bad_row: `raise`, `skip` or `quarantine`.
            quarantine: The file that wrong rows are appended to.
            max_bad_rows: How many rows may be wrong: a number, or a share (judged from 1,000 rows on).
            quadratic_cost: The cost of an example of L tokens is L + this · L².
            num_threads: Threads of the core; None takes all cores.
            return_tensors: `pt` for torch tensors (sharing memory), `np` for numpy arrays.
            return_rows: Adds `rows` to each batch: the number of each example in the epoch.

        Raises:
            ConfigError: A setting is out of range or has no effect.
            FileNotFoundError: A file is missing.
        """
        check_sharing(batch_size, tokens_per_batch, gradient_accumulation_steps, rank, world_size)
        if shuffle_buffer_size < 1:
            raise ConfigError(
                f"shuffle_buffer_size {shuffle_buffer_size} is out of range: expected 1 or more"
            )
        self._sources = resolve_sources(listed(dataset), dataset_info=dataset_info, columns=columns)
        mix = mix or registered_shares(self._sources)
        if world_size > 1 and any(is_stdin(source) for source in self._sources):
            raise ConfigError(
                "stdin belongs to one process, and every rank reads the stream; use a file"
            )
        self._encoder = encoder
        self._accumulation = gradient_accumulation_steps
        self._return_tensors = return_tensors
        self._return_rows = return_rows
        tokens = tokens_per_batch
        micro_batches = gradient_accumulation_steps * world_size
        size = (tokens, micro_batches) if tokens else batch_size * micro_batches
        deciding = (mode, pack_length, mix, stopping_strategy, seed, shuffle_buffer_size)
        self._parts = {
            "encoder": encoder.fingerprint,
            "batches": digest(size, *deciding),
            "data": digest(specs_of(self._sources)),
        }
        self._stream = _core.Stream(
            specs_of(self._sources),
            encoder._core,
            buffer=shuffle_buffer_size,
            mode=mode,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            gradient_accumulation_steps=gradient_accumulation_steps,
            rank=rank,
            world_size=world_size,
            seed=seed,
            pad_token_id=encoder.pad_token_id,
            shares=None if mix is None else [float(share) for share in mix],
            stopping_strategy=stopping_strategy,
            pack_length=_capacity(mode, pack_length, tokens_per_batch, encoder),
            padding_free=padding_free,
            quadratic_cost=quadratic_cost,
            num_threads=num_threads or available_cores(),
            # every rank reads every row, and one of them keeps the wrong ones
            on_bad_row="skip" if rank and on_bad_row == "quarantine" else on_bad_row,
            quarantine=None if rank or quarantine is None else Path(quarantine),
            max_bad_rows=None if max_bad_rows is None else str(max_bad_rows),
        )
        self._steps = 0
        self._chain = START
        self._entries: list[LedgerEntry] = []

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self._encoder

    @property
    def report(self) -> dict[str, Any]:
        """What the rows came to so far, as in `BatchLoader.report`, under `sets` for each data set."""
        return {"sets": json.loads(self._stream.report())}

    def state_dict(self) -> dict[str, Any]:
        """Returns where the stream stands, as values that JSON can hold.

        A state in the middle of an optimizer step goes on from the beginning of that step.
        """
        return {
            **self._parts,
            "stream": json.loads(self._stream.state()),
            "steps": self._steps,
            "ledger": self._chain,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow_data_change: bool = False) -> None:
        """Goes on from a state, also of a run with another number of ranks.

        The window under way is read again, and files are read up to it; the standard input must give the
        same bytes once more.

        Raises:
            ConfigError: The files, the tokenizer, the template or the batches differ from those of the state.
        """
        texts = {
            "data": "the files changed",
            "encoder": "the tokenizer, the chat template or a setting of the encoder (max_length, …) changed",
            "batches": "the seed, the global batch size, the mode, the mix or the shuffle buffer changed",
        }
        changes = [text for name, text in texts.items() if state.get(name) != self._parts[name]]
        if changes and not allow_data_change:
            raise ConfigError(
                f"the loader state is of other data: {'; '.join(changes)}; restore what changed, start anew, or pass "
                "--allow_data_change true to go on at the same place with what there is now"
            )
        if changes:
            warnings.warn(f"going on although {'; '.join(changes)}", stacklevel=2)
        self._stream.restart(json.dumps(state["stream"]))
        self._steps = int(state["steps"])
        self._chain = str(state["ledger"])
        self._entries = []

    def take_ledger(self) -> list[LedgerEntry]:
        """Returns the optimizer steps that were handed out whole since this was last called."""
        entries, self._entries = self._entries, []
        return entries

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rest of the epoch, batches as those of a `BatchLoader`; then the next epoch begins."""
        convert = converter(self._return_tensors)
        epoch = json.loads(self._stream.state())["epoch"]
        while (found := self._stream.next_batch()) is not None:
            arrays, rows, step_hash = found
            if step_hash is not None:
                self._chain = link(self._chain, step_hash)
                entry = LedgerEntry(
                    epoch=epoch, step=self._steps, examples=f"{step_hash:016x}", chain=self._chain
                )
                self._entries.append(entry)
                self._steps += 1
            yield named(arrays, rows if self._return_rows else None, convert)


def _capacity(
    mode: str, pack_length: int | None, tokens_per_batch: int | None, encoder: Encoder
) -> int | None:
    if mode != "pack":
        if pack_length is not None:
            raise ConfigError('pack_length has no effect without mode "pack"')
        return None
    if tokens_per_batch is not None:
        raise ConfigError(
            "tokens_per_batch has no effect on packs, which have pack_length tokens; set batch_size"
        )
    if encoder.max_length >= 2**31:
        raise ConfigError(
            "packs of a stream need a limit of length: open the encoder with max_length"
        )
    if pack_length is not None and pack_length < encoder.max_length:
        raise ConfigError(
            f"pack_length {pack_length} is out of range: examples have up to max_length {encoder.max_length} tokens"
        )
    return pack_length or encoder.max_length
