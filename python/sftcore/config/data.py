"""What is trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from sftcore.config.ranges import check_effects, check_least, check_seed, check_share
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data. What is trained on."""

    dataset: list[str]
    """Files, folders, globs, names (sftcore datasets list), hub ids, URLs or - (stdin); #N at the end draws N rows."""
    val_dataset: list[str] = field(default_factory=list)
    """Files to evaluate on, in place of a part of --dataset."""
    dataset_info: list[str] = field(default_factory=list)
    """Files that name more data sets: .toml, .json or .yaml, in the form of sftcore, LLaMA-Factory or ms-swift."""
    use_hf: bool | None = None
    """The hub of an id without hf:: or ms::; true is Hugging Face, false ModelScope, else as $USE_HF says."""
    split_dataset_ratio: float = 0.01
    """The share of --dataset held out for evaluation; 0 trains on all rows and evaluates nothing."""
    columns: str | None = None
    """New names of keys: '{"a": "query", "b": "response"}' or a=query,b=response."""
    mix: list[float] = field(default_factory=list)
    """The share of each data set in an epoch, like 0.7 0.3; without shares an epoch is all rows once."""
    mix_by: Literal["rows", "tokens"] = "rows"
    """What the shares are of: rows, or trained tokens."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """An epoch of a mix ends when the first data set is used up, or when all are and smaller ones came again."""
    dedup: Literal["none", "exact", "near"] = "none"
    """Leaves out rows equal (or also nearly equal) to an earlier one or to one of --val_dataset."""
    overlap: Literal["none", "exact", "near"] = "exact"
    """Which rows that --dataset and the evaluation rows share are looked for and reported."""
    system: str | None = None
    """A system message for conversations that have none."""
    max_length: int = 2048
    """The longest example, in tokens."""
    truncation_strategy: Literal["delete", "left", "right", "split", "raise"] = "delete"
    """What happens to longer rows: left out, cut on one side, split into several (each counted), or an error."""
    packing: bool = False
    """Puts several examples into one row of up to --packing_length tokens, by whole lengths and anew each epoch; no
    example sees another. --per_device_train_batch_size counts rows then."""
    packing_length: int | None = None
    """The tokens of a packed row; --max_length where not given."""
    tokens_per_batch: int | None = None
    """In place of --per_device_train_batch_size: as many examples as give so many tokens, padding included."""
    padding_free: bool = False
    """Puts the examples of a micro-batch one behind the other, without padding; no example sees another."""
    train_on: str = "assistant"
    """What is trained: assistant, last (the answer to the last question), all, or roles (user,assistant)."""
    train_on_eos: Literal["turn", "last", "none"] = "turn"
    """Which turns train the token that closes them: every trained turn, the last one, or none."""
    ignore_empty_think: bool = False
    """Leaves <think></think> with nothing inside untrained."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Reasoning in the rows: rendered as the template does, or taken out."""
    control_tokens_in_content: Literal["parse", "text"] = "parse"
    """Control tokens written in a message: the tokens, as in Transformers, or plain text."""
    on_lost_content: Literal["warn", "raise", "skip"] = "warn"
    """What becomes of a row of which the chat template leaves out words, reasoning, calls or tools: trained and
    counted (warn), an error (raise), or left out and counted (skip)."""
    append_eos: bool = False
    """Adds the tokenizer's eos, trained, to a chat whose last answer no token ends."""
    chat_template_kwargs: str = "{}"
    """Arguments for the chat template as JSON, like {"enable_thinking": false}; those of a row go before."""
    tokenizer_engine: Literal["auto", "reference", "fast"] = "auto"
    """auto takes the fast engine where it agrees with the tokenizers library on this tokenizer."""
    on_bad_row: Literal["raise", "skip", "quarantine"] = "raise"
    """What happens to a row that is wrong: an error, left out and counted, or also written to --quarantine."""
    quarantine: str | None = None
    """The file for wrong rows; output_dir/quarantine.jsonl where not given."""
    max_bad_rows: str | None = None
    """How many rows may be wrong before it is an error: a number, or a share like 0.1%."""
    streaming: bool = False
    """Reads rows in order without an index, for data too long to index; needs --max_steps."""
    shuffle_buffer_size: int = 10000
    """With --streaming: rows that are shuffled and batched together."""
    hash_whole_files: bool = False
    """Tells files apart by all their bytes, where size, time and parts do not do."""
    model_name: list[str] = field(default_factory=list)
    """For self-cognition: what the model calls itself; one name, or a Chinese and an English one."""
    model_author: list[str] = field(default_factory=list)
    """For self-cognition: who made it; one name, or a Chinese and an English one."""
    num_threads: int | None = None
    """Threads that prepare data; all cores where not given."""
    data_seed: int | None = None
    """Decides the order of the data and the split; --seed where not given."""

    def _check_data(self) -> None:
        if not self.dataset:
            raise ConfigError("--dataset is missing: name at least one file or bundled data set")
        _ = (
            self.template_arguments,
            self.column_names,
        )  # a wrong one is said before anything is loaded
        check_least(self, 2, "max_length")
        check_least(self, 1, "num_threads", "shuffle_buffer_size", "tokens_per_batch")
        check_share(self, "split_dataset_ratio")
        check_seed("data_seed", self.data_seed)
        for name in ("model_name", "model_author"):
            if len(getattr(self, name)) > 2:
                raise ConfigError(f"--{name} takes one name, or a Chinese and an English one")
        if self.packing and self.padding_free:
            raise ConfigError("--packing has no padding between examples: leave out --padding_free")
        if self.packing_length is not None and self.packing_length < self.max_length:
            raise ConfigError(
                f"--packing_length {self.packing_length} holds no example of --max_length {self.max_length}; expected "
                "at least as much"
            )
        if self.packing and self.tokens_per_batch:
            raise ConfigError(
                "--packing fills rows of --packing_length tokens: leave out --tokens_per_batch"
            )
        has_mix = bool(self.mix)
        needed = {
            "packing_length": (self.packing, "--packing true"),
            "mix_by": (has_mix, "--mix"),
            "stopping_strategy": (has_mix, "--mix"),
            "quarantine": (self.on_bad_row == "quarantine", "--on_bad_row quarantine"),
            "max_bad_rows": (self.on_bad_row != "raise", "--on_bad_row skip or quarantine"),
            "shuffle_buffer_size": (self.streaming, "--streaming true"),
            # held-out rows are told by what is in them, so that none is on both sides
            "overlap": (bool(self.val_dataset), "--val_dataset"),
        }
        check_effects(self, DataConfig, needed)
        if has_mix and len(self.mix) != len(self.dataset):
            raise ConfigError(
                f"--mix has {len(self.mix)} shares for {len(self.dataset)} data sets; expected one each"
            )
        if self.streaming:
            for name in ("dedup", "mix_by", "overlap", "hash_whole_files"):
                if getattr(self, name) != getattr(DataConfig, name):
                    raise ConfigError(f"--{name} needs an index of the data; leave out --streaming")

    @property
    def column_names(self) -> dict[str, str] | None:
        """`columns` as a dict.

        Raises:
            ConfigError: It is neither a JSON object of names nor pairs like a=query.
        """
        if self.columns is None:
            return None
        try:
            if self.columns.lstrip().startswith("{"):
                names = json.loads(self.columns)
            else:
                names = dict(pair.split("=", 1) for pair in self.columns.split(","))
        except ValueError:
            names = None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ConfigError(
                f"--columns {self.columns} is wrong: expected a JSON object of names, like "
                '{"a": "query"}, or pairs like a=query,b=response'
            )
        return names

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_kwargs` as a dict.

        Raises:
            ConfigError: It is not a JSON object.
        """
        try:
            arguments = json.loads(self.chat_template_kwargs)
        except json.JSONDecodeError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ConfigError(
                f"--chat_template_kwargs {self.chat_template_kwargs} is wrong: expected a JSON object, like "
                '{"enable_thinking": false}'
            )
        return arguments
