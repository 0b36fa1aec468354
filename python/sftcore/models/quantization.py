"""Weights in 4 or 8 bits beside an adapter (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from sftcore.config.quantization import QuantizationConfig
from sftcore.errors import ConfigError


def quantization_config(config: QuantizationConfig, compute: torch.dtype) -> Any:
    """Returns how `from_pretrained` quantizes the weights that it loads; None where it does not.

    Args:
        config: The settings of a run or of inference.
        compute: The dtype of matrix products, where the settings give no other.

    Raises:
        ConfigError: The package that quantizes is not installed.
    """
    if config.weight_bits is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"weights in {config.weight_bits} bits need the package bitsandbytes, which is not installed; run pip "
            "install bitsandbytes, or take whole weights (--quant_bits 0)"
        )
    if config.weight_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    given = config.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, given) if given else compute,
    )


def prepare_quantized(model: Any) -> Any:
    """Returns a model whose frozen norms and head are float32 where the rest is quantized; others stay as they are."""
    if not getattr(model, "is_quantized", False):
        return model
    # the Trainer turns on checkpointing where it is asked for
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
