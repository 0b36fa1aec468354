"""The Rust core. Private: `sftcore.data` is its only user."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__version__: str

@final
class Encoder:
    """Rows to examples with the tokenizer and template of a model folder."""

    def __new__(
        cls,
        folder: Path,
        *,
        template: str | None,
        max_length: int,
        truncation_strategy: str,
        system: str | None,
        num_threads: int,
        tokenizer_engine: str,
        train_on: str,
        train_on_eos: str,
        ignore_empty_think: bool,
        reasoning: str,
        control_tokens_in_content: str,
        on_lost_content: str,
        append_eos: bool,
        chat_template_kwargs: str,
    ) -> Encoder: ...
    @property
    def tokenizer_engine(self) -> str: ...
    @property
    def tokenizer_engine_reason(self) -> str | None: ...
    @property
    def tool_use_template(self) -> str | None: ...
    def explain(
        self, row: bytes
    ) -> tuple[str, list[tuple[int, str | None, int, int, float, int | None, int | None]]]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def turn_ends(self) -> list[tuple[str, str, str, bool]]: ...
    def template(self) -> Template: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer_hash(self) -> int: ...
    def with_template(self, template: str) -> Encoder: ...
    def encode(self, row: bytes) -> Example: ...
    def encode_batch(self, rows: Sequence[bytes]) -> list[Example]: ...
    def render(self, row: bytes, add_generation_prompt: bool) -> str: ...
    def render_file(
        self, path: Path, limit: int
    ) -> list[tuple[int, str, list[tuple[int, int, bool]], int | None]]: ...
    def tokenize(self, text: str, add_special_tokens: bool) -> NDArray[np.int64]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def special_token(self, name: str) -> str | None: ...

@final
class Example:
    """A row as text, tokens and mask; arrays are one-dimensional and as long as the tokens."""

    @property
    def text(self) -> str: ...
    @property
    def segments(self) -> list[tuple[int, int, bool]]: ...
    @property
    def lost(self) -> list[str]: ...
    @property
    def endless_turns(self) -> int: ...
    @property
    def input_ids(self) -> NDArray[np.int64]: ...
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...
    @property
    def loss_weights(self) -> NDArray[np.float32]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...

@final
class Template:
    """A chat template without a tokenizer, for looking at data."""

    def __new__(cls, source: str, special_tokens: Sequence[tuple[str, str]]) -> Template: ...
    def render_file(
        self, path: Path, limit: int
    ) -> list[tuple[int, str, list[tuple[int, int, bool]], int | None]]: ...
    def render_row(self, row: bytes) -> tuple[str, list[tuple[int, int, bool]]]: ...
    @property
    def turn_ends(self) -> list[tuple[str, str, str, bool]]: ...
    @property
    def generation_prompt(self) -> str: ...
    @property
    def is_tagged(self) -> bool: ...
    def compiled_form(self) -> tuple[bool, list[str], list[str]]: ...
    @staticmethod
    def shape_of(path: Path) -> str: ...

@final
class Dataset:
    """Indexed files."""

    def __new__(
        cls,
        specs: str,
        encoder: Encoder,
        *,
        encoder_fingerprint: str,
        num_threads: int,
        seed: int,
        on_bad_row: str,
        quarantine: Path | None,
        max_bad_rows: str | None,
        dedup: str,
        cache_folder: Path | None,
        hash_whole_files: bool,
        progress: Callable[[int, int], object] | None,
    ) -> Dataset: ...
    def split(self, split: str, ratio: float, seed: int) -> RowSets: ...
    def overlap(
        self,
        sets: RowSets,
        other: Dataset,
        other_sets: RowSets,
        *,
        near: bool,
        progress: Callable[[int, int], object] | None,
    ) -> list[tuple[int, int, bool]]: ...
    def batches(
        self,
        sets: RowSets,
        *,
        mode: str,
        batch_size: int,
        tokens_per_batch: int | None,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_token_id: int,
        shares: Sequence[float] | None,
        mix_by: str,
        stopping_strategy: str,
        pack_length: int | None,
        padding_free: bool,
        quadratic_cost: float,
    ) -> Batches: ...
    def count(self, sets: RowSets) -> list[tuple[int, int, int, int]]: ...
    def place(self, row: int) -> tuple[Path, int] | None: ...
    def text(self, row: int) -> tuple[bytes, str]: ...
    def verify(self, row: int) -> int: ...
    def set_of(self, row: int) -> int: ...
    def fingerprint(self, sets: RowSets) -> int: ...
    def report(self) -> str: ...
    @property
    def origin(self) -> str: ...

@final
class RowSets:
    """Rows of each data set."""

    def without(self, rows: Sequence[int]) -> RowSets: ...
    def __len__(self) -> int: ...

_Arrays: TypeAlias = tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64] | None,
    NDArray[np.int64] | None,
    NDArray[np.float32] | None,
    NDArray[np.int32] | None,
]

@final
class Batches:
    """The micro-batches of one rank."""

    def start(self, epoch: int, step: int) -> None: ...
    def stop(self) -> None: ...
    def next_batch(self) -> tuple[_Arrays, NDArray[np.int64], int | None] | None: ...
    def global_batch(self, epoch: int, step: int) -> list[list[int]] | None: ...
    def num_steps(self, epoch: int) -> int: ...
    def shapes(self, epoch: int) -> NDArray[np.int64]: ...
    def lengths(self, epoch: int) -> NDArray[np.int64]: ...
    def count(self, epoch: int) -> list[tuple[int, int, int, int]]: ...

@final
class Stream:
    """Data sets that are read in order and once an epoch."""

    def __new__(
        cls,
        specs: str,
        encoder: Encoder,
        *,
        buffer: int,
        mode: str,
        batch_size: int,
        tokens_per_batch: int | None,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_token_id: int,
        shares: Sequence[float] | None,
        stopping_strategy: str,
        pack_length: int | None,
        padding_free: bool,
        quadratic_cost: float,
        num_threads: int,
        on_bad_row: str,
        quarantine: Path | None,
        max_bad_rows: str | None,
    ) -> Stream: ...
    def restart(self, state: str) -> None: ...
    def next_batch(self) -> tuple[_Arrays, NDArray[np.int64], int | None] | None: ...
    def state(self) -> str: ...
    def report(self) -> str: ...
