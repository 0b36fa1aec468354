"""Which parameters are trained."""

from __future__ import annotations

from sftcore.tuners.apply import (
    apply_tuner,
    check_engine,
    tuner_callbacks,
    tuner_loss,
    tuner_numbers,
)
from sftcore.tuners.rates import learning_rate_factors, undecayed_parameters
from sftcore.tuners.table import count_parameters, describe_parameters, trained_kinds

__all__ = [
    "apply_tuner",
    "check_engine",
    "count_parameters",
    "describe_parameters",
    "learning_rate_factors",
    "trained_kinds",
    "tuner_callbacks",
    "tuner_loss",
    "tuner_numbers",
    "undecayed_parameters",
]
