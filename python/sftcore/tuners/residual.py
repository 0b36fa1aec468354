"""PiSSA and OLoRA: a LoRA that starts as a part of the weight, which is taken out of it.

What is left of the weight is frozen and trained beside, but the base model on disk is whole. So a saved adapter is the
difference to the start, B A - B0 A0, as one LoRA of twice the rank: plain PEFT loads it on the original weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from sftcore.tuners.exact import ADAPTER, ExactModel

_PREFIX = "base_model.model."
_START = "start:"


class ResidualModel(ExactModel):
    """A LoRA that started from a part of the weights."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = ADAPTER) -> None:
        super().__init__(model, peft_config, adapter_name)
        self.start = {
            f"{_PREFIX}{name}.lora_{letter}.{ADAPTER}.weight": matrix.detach().cpu().clone()
            for name, layer in self.lora_layers().items()
            for letter, matrix in (
                ("A", layer.lora_A[ADAPTER].weight),
                ("B", layer.lora_B[ADAPTER].weight),
            )
        }

    def lora_layers(self) -> dict[str, Any]:
        """Returns each LoRA layer by the name it has in the model without adapters."""
        modules = self.base_model.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLinear)}

    def converted(self, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Returns the LoRA of twice the rank that adds the trained update to the original weights."""
        config = copy.deepcopy(self.peft_config[ADAPTER])
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2
        plain = dict(state)
        for name, start in self.start.items():
            first = start.to(plain[name])
            is_down = f".lora_A.{ADAPTER}." in name
            parts = [plain[name], first if is_down else -first]
            plain[name] = torch.cat(parts, dim=0 if is_down else 1)
        return config, plain

    def more_state(self) -> dict[str, Tensor]:
        """Returns the start."""
        return {_START + name: value for name, value in self.start.items()}

    def load_more_state(self, state: dict[str, Tensor]) -> None:
        """Takes back the start, and what was taken out of the weights for it.

        A start that is computed again is the same on the same machine; elsewhere it may differ in the last bits or,
        where it is drawn, wholly.
        """
        saved = {name.removeprefix(_START): value for name, value in state.items()}
        for name, layer in self.lora_layers().items():
            pair = [f"{_PREFIX}{name}.lora_{letter}.{ADAPTER}.weight" for letter in "AB"]
            if not all(torch.equal(saved[key], self.start[key]) for key in pair):
                weight = layer.get_base_layer().weight
                (down, up), (old_down, old_up) = (
                    [start[key].to(weight.device, torch.float32) for key in pair]
                    for start in (saved, self.start)
                )
                change = layer.scaling[ADAPTER] * (old_up @ old_down - up @ down)
                weight.data = (weight.data.float() + change).to(weight.dtype)
        self.start = saved
