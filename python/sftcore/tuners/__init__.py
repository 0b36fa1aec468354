"""Which parameters are trained."""

from __future__ import annotations

from sftcore.tuners.apply import (
    apply_tuner,
    check_engine,
    tuner_callbacks,
    tuner_loss,
    tuner_numbers,
)
from sftcore.tuners.coverage import coverage
from sftcore.tuners.rates import learning_rate_factors, undecayed_parameters
from sftcore.tuners.table import count_parameters, describe_parameters, trained_kinds
from sftcore.tuners.targets import notes_on_targets

__all__ = [
    "apply_tuner",
    "check_engine",
    "count_parameters",
    "coverage",
    "describe_parameters",
    "learning_rate_factors",
    "notes_on_targets",
    "trained_kinds",
    "tuner_callbacks",
    "tuner_loss",
    "tuner_numbers",
    "undecayed_parameters",
]
