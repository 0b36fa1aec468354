"""A folder to a model on the right device, in the right dtype."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from sftcore.errors import ConfigError, first_line


def pick_dtype(name: str) -> torch.dtype:
    """Returns the dtype of weights; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load_settings(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Returns the configuration of a model.

    Raises:
        ConfigError: It is none of a causal language model, or it brings code of its own that was not asked for.
    """
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder} brings Python code of its own; read it, and pass --trust_remote_code true to run it"
            ) from error
        raise ConfigError(f"{folder}: Transformers does not know this model: {error}") from error
    own_code = getattr(settings, "auto_map", None) or {}
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise ConfigError(
            f"{folder} is a model of type {settings.model_type}, which is no causal language model; expected one that "
            "goes on with a text, such as Llama or Qwen"
        )
    return settings


def load_model(
    folder: Path,
    *,
    torch_dtype: str = "auto",
    attn_impl: str = "auto",
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    model_class: Any = AutoModelForCausalLM,
    **more: Any,
) -> Any:
    """Loads a causal language model for training or inference: on the CPU, or on the GPU where it is quantized.

    Args:
        folder: Of the model.
        torch_dtype: Of the weights.
        attn_impl: The attention kernel.
        trust_remote_code: Runs Python code of the model's own.
        quantization_config: How weights are quantized.
        model_class: Whose `from_pretrained` is called.
        more: Arguments of `from_pretrained` that place or share the weights.

    Raises:
        ConfigError: A file of weights is damaged.
    """
    arguments: dict[str, Any] = {
        "dtype": pick_dtype(torch_dtype),
        "trust_remote_code": trust_remote_code,
    }
    if attn_impl != "auto":
        arguments["attn_implementation"] = attn_impl
    if quantization_config is not None:
        place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        arguments |= {"quantization_config": quantization_config, "device_map": {"": place}}
    try:
        return model_class.from_pretrained(folder, **{**arguments, **more})
    except SafetensorError as error:
        raise ConfigError(
            f"{folder}: the weights are damaged ({first_line(error)}); copy or download them again"
        ) from error


def quieten() -> None:
    """Silences notes of libraries that a user can do nothing about."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(peft|torch|transformers|accelerate)"
    )
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # accelerate imports it wherever it is installed; it sets the level of its log itself, but leaves filters
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
