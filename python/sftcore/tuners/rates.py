"""Learning rates that differ between the parameters of a tuner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftcore.config import TrainConfig
from sftcore.tuners.sora import SoraModel

if TYPE_CHECKING:
    from torch import nn

_GATES_FACTOR = 100.0


def learning_rate_factors(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Returns what the learning rate of a parameter is multiplied by, where that is not 1.

    LoRA+ trains B faster than A (Hayou et al. 2024, arXiv:2402.12354). The gates of SoRA move by about 1 in a run,
    other parameters by much less.

    Args:
        model: The model with its tuner.
        config: The settings of the run.

    Returns:
        The factor by the name that `model.named_parameters()` has for a parameter.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if config.lorap_lr_ratio is not None:
        ups = (".lora_B.", ".lora_embedding_B.")
        return {
            name: config.lorap_lr_ratio for name in trained if any(part in name for part in ups)
        }
    if isinstance(model, SoraModel):
        factor = _GATES_FACTOR
        if config.sora_lr is not None:
            factor = config.sora_lr / config.effective_learning_rate
        return dict.fromkeys(model.gates(), factor)
    return {}


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Returns the names of parameters of a tuner that weight decay would distort: the gates of SoRA."""
    return set(model.gates()) if isinstance(model, SoraModel) else set()
