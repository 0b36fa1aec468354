"""Which model is tuned, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model. Which model is tuned, and how it is loaded."""

    model: str
    """A folder, a run folder or a checkpoint, a hub id, a .gguf file, or a short name (smollm2-135m)."""
    template: str = "auto"
    """The chat template: auto (the model's own), a packaged name, or a .jinja file."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights; auto is float32 on a CPU and for weights that are trained (a GPU then computes in
    bfloat16 all the same), bfloat16 for frozen weights on a GPU that has it."""
    attn_impl: str = "auto"
    """The attention kernel: auto (the fastest that fits, and why is said), sdpa, eager, flex_attention,
    flash_attention_2, flash_attention_3, or a kernel of the hub (kernels-community/...)."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model; read it first."""
