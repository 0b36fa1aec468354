"""What a checkpoint holds, read by plain Transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of the model or adapter in a folder, of all its files."""
    found = {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    assert found
    return found


def load_plain(folder: Path, base: Path) -> Any:
    """Returns a whole model, or that of another folder with the adapter of this one."""
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder)
    whole: Any = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(whole, folder)


def logits_of(folder: Path, base: Path) -> torch.Tensor:
    """Returns the logits of a model, or of a model with an adapter, for 40 tokens, `[1, 40, vocabulary]`."""
    model = load_plain(folder, base).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(100, 140)[None], use_cache=False).logits
    return logits
