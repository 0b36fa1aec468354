"""Memory and speed settings as arguments of the Trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from sftcore.config import TrainConfig
from sftcore.models.checkpointing import checkpointing_arguments
from sftcore.models.dtypes import choose_dtypes


def memory_arguments(config: TrainConfig) -> dict[str, Any]:
    """Returns the arguments of `TrainingArguments` that decide dtype, checkpointing, compilation and kernels."""
    on_gpu = torch.cuda.is_available()
    compute = choose_dtypes(config.torch_dtype, trains_weights=config.trains_weights).compute
    arguments: dict[str, Any] = {
        "bf16": on_gpu and compute == torch.bfloat16,
        "fp16": on_gpu and compute == torch.float16,
        "torch_compile": config.torch_compile,
    }
    if config.tf32 is not None and on_gpu:
        arguments["tf32"] = config.tf32
    if config.use_liger_kernel:
        # the loss is computed here, a chunk at a time
        fused = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        arguments |= {"use_liger_kernel": True, "liger_kernel_config": fused}
    names = set(TrainingArguments.__dataclass_fields__)
    # Transformers 6 drops the first pair of names
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    arguments[f"{prefix}_checkpointing"] = config.gradient_checkpointing
    if config.gradient_checkpointing:
        kwargs = checkpointing_arguments(config.gradient_checkpointing_kind)
        arguments[f"{prefix}_checkpointing_kwargs"] = kwargs
    return arguments
