"""The settings of `sftcore infer` and `sftcore merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftcore.config.generation import GenerationConfig
from sftcore.config.quantization import QuantizationConfig
from sftcore.config.ranges import check_seed
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InferConfig(GenerationConfig, QuantizationConfig):
    """Inference. Which model answers what, and how."""

    model: str | None = None
    """A folder, a run folder or a checkpoint, a hub id, a .gguf file, or a short name; found through --adapters where
    not given."""
    adapters: str | None = None
    """A checkpoint with an adapter to put on the model, or its run folder (the best one, else the last)."""
    prompt: str | None = None
    """One question; without it and without --prompts, an interactive chat starts."""
    prompts: str | None = None
    """A file of questions: .txt with one a line, or .jsonl with "query" or "messages"."""
    output: str | None = None
    """Where the answers to --prompts go, as jsonl; printed where not given."""
    system: str | None = None
    """A system message; that of the training where not given, '' for none."""
    template: str = "auto"
    """The chat template: auto (the checkpoint's own), a packaged name, or a .jinja file."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights; auto is bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model; read it first."""
    seed: int = 42
    """Decides the draws."""

    def __post_init__(self) -> None:
        self._check_generation()
        self._check_quantization()
        check_seed("seed", self.seed)
        if self.model is None and self.adapters is None:
            raise ConfigError("--model is missing: name a model, or a checkpoint with --adapters")
        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("--prompt and --prompts exclude each other")
        if self.output is not None and self.prompts is None:
            raise ConfigError("--output has no effect without --prompts")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merging. Which adapter goes into which weights."""

    adapters: str
    """The checkpoint with the adapter, or its run folder (the best one, else the last)."""
    output_dir: str | None = None
    """Where the merged model goes; the checkpoint with -merged at its end where not given."""
    model: str | None = None
    """The base model; the one the checkpoint names where not given."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the merged weights; auto is that of the base model."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model; read it first."""
    overwrite: bool = False
    """Replaces an output folder that is not empty."""
