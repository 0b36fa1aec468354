"""The settings of `sftcore train`, one dataclass a concern."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sftcore.errors import ConfigError


def check_range(name: str, value: float | None, expected: str, *, holds: bool) -> None:
    """Raises a ConfigError that says what `--name` should be, unless `holds`."""
    if not holds:
        raise ConfigError(f"--{name} {value} is out of range: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model. Which model is tuned, and how it is loaded."""

    model: str
    """A folder, a hub id, a .gguf file, or a short name (smollm2-135m)."""
    template: str = "auto"
    """The chat template: auto (the model's own), a packaged name, or a .jinja file."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights; auto is bfloat16 on a GPU that has it, else float32."""
    attn_impl: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention kernel; auto lets Transformers choose."""


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
    allow_data_change: bool = False
    """Resumes although the data or the template changed since the checkpoint."""
    model_name: list[str] = field(default_factory=list)
    """For self-cognition: what the model calls itself; one name, or a Chinese and an English one."""
    model_author: list[str] = field(default_factory=list)
    """For self-cognition: who made it; one name, or a Chinese and an English one."""
    num_threads: int | None = None
    """Threads that prepare data; all cores where not given."""
    data_seed: int | None = None
    """Decides the order of the data and the split; --seed where not given."""


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """Tuner. Which parameters are trained."""

    tuner_type: Literal["lora", "full"] = "lora"
    """lora trains low-rank matrices beside frozen weights; full trains all weights."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """For lora: all-linear (every linear layer but the head), or names of modules."""
    lora_rank: int = 8
    """The rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA matrices."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimization. How weights are updated."""

    learning_rate: float | None = None
    """The highest learning rate; 1e-4 for lora and 1e-5 for full where not given."""
    per_device_train_batch_size: int = 1
    """Examples of a micro-batch."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches of an optimizer step; enough for 16 examples a step where not given."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps, in place of --num_train_epochs; -1 leaves it to the epochs."""
    optim: str = "adamw_torch"
    """The optimizer, by its name in Transformers."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """The decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """The decay of the mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.05
    """The share of all steps in which the learning rate rises from 0."""
    gradient_checkpointing: bool = True
    """Computes activations again in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Decides the initial LoRA weights, dropout and, without --data_seed, the order of the data."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output. What is written and shown, and when."""

    output_dir: str = "output"
    """Holds a folder for each model and run."""
    add_version: bool = True
    """Writes into output_dir/MODEL/vN-TIME; otherwise into output_dir itself."""
    logging_steps: int = 5
    """Steps between two logged losses."""
    eval_steps: int | None = None
    """Steps between two evaluations; --save_steps where not given."""
    save_steps: int | None = None
    """Steps between two checkpoints; an epoch, and at most 500, where not given."""
    save_total_limit: int | None = 2
    """Checkpoints that are kept; the best one is always among them."""
    per_device_eval_batch_size: int | None = None
    """Examples of an evaluation batch; --per_device_train_batch_size where not given."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder to go on from, exactly where it was saved."""
    disable_tqdm: bool = False
    """Prints lines in place of a progress bar."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OutputConfig, OptimizationConfig, TunerConfig, DataConfig, ModelConfig):
    """All settings of a training run."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ConfigError("--dataset is missing: name at least one file or bundled data set")
        _ = self.template_arguments  # a wrong one is said before anything is loaded
        at_least_one = {
            "max_length": self.max_length - 1,
            "lora_rank": self.lora_rank,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "logging_steps": self.logging_steps,
            "eval_steps": self.eval_steps,
            "save_steps": self.save_steps,
            "save_total_limit": self.save_total_limit,
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "num_threads": self.num_threads,
            "shuffle_buffer_size": self.shuffle_buffer_size,
        }
        for name, value in at_least_one.items():
            least = 2 if name == "max_length" else 1
            check_range(
                name, getattr(self, name), f"{least} or more", holds=value is None or value >= 1
            )
        positive = {
            "learning_rate": self.learning_rate,
            "lora_alpha": self.lora_alpha,
            "num_train_epochs": self.num_train_epochs,
        }
        for name, number in positive.items():
            check_range(name, number, "a number > 0", holds=number is None or number > 0)
        for name in ("weight_decay", "max_grad_norm"):
            number = getattr(self, name)
            check_range(name, number, "a number >= 0", holds=number >= 0)
        for name in (
            "split_dataset_ratio",
            "lora_dropout",
            "adam_beta1",
            "adam_beta2",
            "warmup_ratio",
        ):
            number = getattr(self, name)
            check_range(name, number, "0 <= number < 1", holds=0 <= number < 1)
        check_range(
            "max_steps",
            self.max_steps,
            "1 or more, or -1",
            holds=self.max_steps in (-1,) or self.max_steps >= 1,
        )
        self._check_effects()

    def _check_effects(self) -> None:
        if self.tuner_type == "full":
            for name in ("target_modules", "lora_rank", "lora_alpha", "lora_dropout"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ConfigError(
                        f"--{name} has no effect with --tuner_type full; leave one of them out"
                    )
        self._check_data_effects()
        for name in ("model_name", "model_author"):
            if len(getattr(self, name)) > 2:
                raise ConfigError(f"--{name} takes one name, or a Chinese and an English one")

    def _check_data_effects(self) -> None:
        _ = self.column_names
        has_mix, leaves_out = bool(self.mix), self.on_bad_row != "raise"
        needed = {
            "mix_by": (has_mix, "--mix"),
            "stopping_strategy": (has_mix, "--mix"),
            "quarantine": (self.on_bad_row == "quarantine", "--on_bad_row quarantine"),
            "max_bad_rows": (leaves_out, "--on_bad_row skip or quarantine"),
            "shuffle_buffer_size": (self.streaming, "--streaming true"),
            "allow_data_change": (bool(self.resume_from_checkpoint), "--resume_from_checkpoint"),
        }
        for name, (is_there, what) in needed.items():
            if getattr(self, name) != getattr(DataConfig, name) and not is_there:
                raise ConfigError(f"--{name} has no effect without {what}")
        if has_mix and len(self.mix) != len(self.dataset):
            raise ConfigError(
                f"--mix has {len(self.mix)} shares for {len(self.dataset)} data sets; expected one each"
            )
        if not self.streaming:
            return
        if self.max_steps == -1:
            raise ConfigError("--streaming knows no end of the data; set --max_steps")
        for name in ("dedup", "mix_by", "hash_whole_files"):
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

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate, also where none is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.tuner_type == "lora" else 1e-5

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of an optimizer step on each of `world_size` ranks."""
        if self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps
        return max(1, -(-16 // (self.per_device_train_batch_size * world_size)))

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as `--config` takes them back."""
        return asdict(self)


_DEFAULTS: dict[str, Any] = {
    "target_modules": ["all-linear"],
    "lora_rank": TunerConfig.lora_rank,
    "lora_alpha": TunerConfig.lora_alpha,
    "lora_dropout": TunerConfig.lora_dropout,
}
