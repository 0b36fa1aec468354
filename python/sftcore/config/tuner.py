"""Which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sftcore.config.ranges import check_effects, check_least, check_positive, check_share


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """Tuner. Which parameters are trained."""

    tuner_type: Literal["lora", "full"] = "lora"
    """lora trains low-rank matrices beside frozen weights; full trains all weights."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """For lora: all-linear (every linear layer but the head), or names of modules."""
    lora_rank: int = 8
    """The rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA matrices."""

    def _check_tuner(self) -> None:
        check_least(self, 1, "lora_rank")
        check_positive(self, "lora_alpha")
        check_share(self, "lora_dropout")
        has_lora = self.tuner_type == "lora"
        names = ("target_modules", "lora_rank", "lora_alpha", "lora_dropout")
        check_effects(self, TunerConfig, dict.fromkeys(names, (has_lora, "--tuner_type lora")))
