"""How a run computes its loss: chosen once, on the very model, and said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.head import install_head_loss, plain_losses, why_not_chunked
from sftcore.train.inputs import InputKind, model_inputs
from sftcore.train.loss import Objective, TokenLosses

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossMethod:
    """From a model and a batch to the losses of its trained tokens.

    Attributes:
        objective: What is minimised.
        kind: How the model wants its batches.
        is_chunked: Whether logits exist for a chunk of tokens at a time alone.
        reason: Why they exist for whole batches, where they do.
    """

    objective: Objective
    kind: InputKind
    is_chunked: bool
    reason: str | None = None

    def losses(self, model: Any, batch: dict[str, Any]) -> tuple[TokenLosses, Tensor | None]:
        """Returns the losses of a batch, and what the model adds of its own (the balance of experts).

        Args:
            model: The model that `choose_loss` saw, perhaps inside DDP or another engine.
            batch: A batch of the loader, on the model's device.
        """
        inputs = model_inputs(batch, self.kind)
        if not self.is_chunked:
            return plain_losses(model, inputs, self.objective)
        output = model(**inputs, trained_tokens=True)
        return TokenLosses(output["loss"], output["losses"], output["right"]), None


def choose_loss(
    config: TrainConfig, model: Any, kind: InputKind, *, calls_head_once: bool = False
) -> LossMethod:
    """Returns how the losses of a model are computed, and prepares the model for it.

    Args:
        config: The settings of the run.
        model: The model with its tuner.
        kind: How it wants its batches.
        calls_head_once: As in `install_head_loss`.

    Raises:
        ConfigError: `--loss_impl chunked` was asked for, and the head of the model is not plain.
    """
    objective = Objective(
        label_smoothing=config.label_smoothing, z_loss=config.z_loss, dft=config.enable_dft_loss
    )
    reason: str | None = "as asked for"
    if config.loss_impl != "plain":
        reason = why_not_chunked(model, calls_head_once=calls_head_once)
        if reason and config.loss_impl == "chunked":
            raise ConfigError(
                f"--loss_impl chunked cannot be used: {reason}; --loss_impl auto takes what can"
            )
    if reason is None:
        install_head_loss(
            model, objective, chunk_size=config.loss_chunk_size, calls_head_once=calls_head_once
        )
    return LossMethod(objective=objective, kind=kind, is_chunked=reason is None, reason=reason)
