"""Which parameters are trained."""

from __future__ import annotations

from sftcore.tuners.lora import apply_tuner, count_parameters

__all__ = ["apply_tuner", "count_parameters"]
