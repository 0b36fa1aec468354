"""What is minimised, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftcore.config.ranges import check_effects, check_least, check_share
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss. What is minimised, and how it is computed."""

    loss_impl: Literal["auto", "chunked", "plain"] = "auto"
    """chunked takes trained tokens alone through the head, a chunk at a time, so that the logits of a batch never
    exist; plain computes all logits; auto is chunked where it gives the value of plain on this very model."""
    loss_chunk_size: int | None = None
    """Tokens of a chunk; as many as make 64 MB of logits on a CPU and 512 MB on a GPU where not given."""
    label_smoothing: float = 0.0
    """This share of the target is spread over all tokens of the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Adds this times the squared logarithm of the softmax denominator, which keeps logits small (PaLM: 1e-4)."""
    enable_dft_loss: bool = False
    """Weighs each token by the probability the model gives it, as dynamic fine-tuning does (Wu et al. 2025)."""

    def _check_loss(self) -> None:
        check_least(self, 1, "loss_chunk_size")
        check_share(self, "label_smoothing")
        check_least(self, 0, "z_loss")
        is_chunked = self.loss_impl != "plain", "--loss_impl auto or chunked"
        check_effects(self, LossConfig, {"loss_chunk_size": is_chunked})
        if self.enable_dft_loss and self.label_smoothing:
            raise ConfigError(
                "--enable_dft_loss and --label_smoothing exclude each other: one weighs the target by its "
                "probability, the other spreads it"
            )
