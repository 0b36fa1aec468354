"""LoftQ: a LoRA that starts as what 4-bit weights lost, as far as its rank goes (Li et al. 2023, arXiv:2310.08659).

The quantized weights stay as they are, so that a saved adapter belongs on the same model, quantized alike. This is one
round of the paper's alternation: the quantized weights are those that `from_pretrained` makes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from sftcore.tuners.exact import ADAPTER


def start_from_quantized(model: Any, folder: str, *, trust_remote_code: bool) -> None:
    """Sets the LoRA of each module to the best approximation of its quantization error.

    Args:
        model: A PEFT model with LoRA on quantized weights.
        folder: The model with the original weights, which are read into the memory of the host.
        trust_remote_code: Whether code that the model brings may run.
    """
    original = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    weights = dict(original.named_parameters())
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        with torch.no_grad():
            quantized = dequantize_module_weight(base).float()
            error = weights[f"{name}.weight"].to(quantized) - quantized
            left, values, right = torch.linalg.svd(error, full_matrices=False)
            rank = layer.r[ADAPTER]
            root = values[:rank].sqrt()
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            down.copy_(root[:, None] * right[:rank])
            up.copy_(left[:, :rank] * root / layer.scaling[ADAPTER])
