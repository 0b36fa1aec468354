"""How answers are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from sftcore.config.ranges import check_effects, check_least, check_positive, check_range


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Generation. How answers are drawn."""

    max_new_tokens: int = 512
    """The longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher draws more freely."""
    top_p: float = 1.0
    """Draws among the likeliest tokens that together have this probability."""
    top_k: int = 50
    """Draws among this many likeliest tokens; 0 among all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred become less likely."""

    def _check_generation(self) -> None:
        check_least(self, 1, "max_new_tokens")
        check_least(self, 0, "temperature", "top_k")
        check_positive(self, "repetition_penalty")
        check_range("top_p", self.top_p, "0 < number <= 1", holds=0 < self.top_p <= 1)
        draws = self.temperature > 0, "--temperature above 0"
        check_effects(self, GenerationConfig, {"top_p": draws, "top_k": draws})
