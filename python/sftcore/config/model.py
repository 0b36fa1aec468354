"""Which model is tuned, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
