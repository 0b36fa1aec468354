"""LoRA through PEFT, and full training."""

from __future__ import annotations

from collections import Counter
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError


def apply_tuner(model: nn.Module, config: TrainConfig) -> Any:
    """Returns the model with the parameters that `config` names set to be trained.

    Raises:
        ConfigError: A target module does not exist.
    """
    if config.tuner_type == "full":
        return model
    targets: str | list[str] = config.target_modules
    if targets in (["all-linear"], ["ALL"], ["all"]):
        targets = "all-linear"
    else:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, child in model.named_modules()
            if isinstance(child, nn.Linear)
        }
        unknown = [name for name in targets if name.rsplit(".", 1)[-1] not in linear]
        if unknown:
            raise ConfigError(
                f"--target_modules {unknown[0]} is no linear layer of this model; expected all-linear or some of "
                f"{', '.join(sorted(linear))}"
            )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)  # type: ignore[arg-type, unused-ignore]


def count_parameters(model: nn.Module) -> tuple[int, int, Counter[str]]:
    """Returns all parameters, the trained ones, and the trained ones by kind of module."""
    kinds: Counter[str] = Counter()
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            parts = [part for part in name.split(".") if not part.isdigit()]
            owner = parts[-4] if "lora_" in name and len(parts) > 3 else parts[-2]
            kinds[owner] += parameter.numel()
    return total, sum(kinds.values()), kinds
