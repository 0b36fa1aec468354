"""A model to the tuner that the settings name, and what the tuner asks of a run.

The trainer knows no tuner by name: it adds `tuner_loss` to its loss and `tuner_numbers` to its logs, and runs the
callbacks of `tuner_callbacks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.models.quantization import prepare_quantized
from sftcore.tuners.adalora import AdaLoraModel, AllocateRanks
from sftcore.tuners.adapters import add_adapter
from sftcore.tuners.freeze import train_weights
from sftcore.tuners.new_rows import check_trained
from sftcore.tuners.sora import ShrinkGates, SoraModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainerCallback


def apply_tuner(model: Any, config: TrainConfig, new_rows: Sequence[int] = ()) -> Any:
    """Returns the model with the parameters that `config` names set to be trained.

    Args:
        model: A causal language model of Transformers, as it was loaded.
        config: The settings of the run.
        new_rows: Rows of the embedding, and of the head, that belong to new tokens; they are trained too.

    Raises:
        ConfigError: A name fits nothing in the model, or a setting does not fit it.
    """
    if config.trains_weights:
        train_weights(model, config)
        if new_rows:
            check_trained(model)
        return model
    return add_adapter(prepare_quantized(model), config, new_rows)


def tuner_callbacks(model: Any, config: TrainConfig, total_steps: int) -> list[TrainerCallback]:
    """Returns what a tuner does after each optimizer step.

    Args:
        model: The model that `apply_tuner` gave.
        config: The settings of the run.
        total_steps: The optimizer steps of the whole run.

    Raises:
        ConfigError: The schedule of a tuner does not fit into these steps.
    """
    if isinstance(model, SoraModel):
        return [ShrinkGates(model, config.sora_lambda)]
    if isinstance(model, AdaLoraModel):
        return [AllocateRanks(model, total_steps)]
    return []


def tuner_loss(model: Any) -> Tensor | None:
    """Returns what a tuner adds to the loss of an optimizer step, if anything."""
    if isinstance(model, AdaLoraModel):
        return model.regularization()
    return None


def tuner_numbers(model: Any) -> dict[str, float]:
    """Returns what is worth seeing of a tuner while it trains, for the log."""
    return model.numbers() if isinstance(model, AdaLoraModel | SoraModel) else {}


def check_engine(config: TrainConfig, engine: str) -> None:
    """Raises a ConfigError where a tuner cannot be trained by an engine.

    Args:
        config: The settings of the run.
        engine: `single`, `ddp`, `fsdp` or `deepspeed`.
    """
    reasons = {
        "adalora": "ranks are told from gradients, which DeepSpeed has dropped when the step is done",
        "sora": "gates are set after the step, and DeepSpeed writes its own copy of them over it",
    }
    if engine == "deepspeed" and config.tuner_type in reasons:
        raise ConfigError(
            f"--tuner_type {config.tuner_type} cannot be trained with DeepSpeed: {reasons[config.tuner_type]}; "
            "leave out --deepspeed, or take --tuner_type lora"
        )
