"""What happens when numbers overflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FiniteConfig:
    """Safety. What happens when numbers overflow."""

    on_non_finite: Literal["raise", "skip"] = "raise"
    """A loss or gradient that is NaN or infinite stops the run and names the rows at fault; or that step is left out
    and counted."""
