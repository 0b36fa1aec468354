"""What is measured on rows that are not trained, and when."""

from __future__ import annotations

from dataclasses import dataclass

from sftcore.config.ranges import check_least


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation. What is measured on rows that are not trained, and when."""

    eval_steps: int | None = None
    """Steps between two evaluations; --save_steps where not given."""
    per_device_eval_batch_size: int | None = None
    """Examples of an evaluation batch; --per_device_train_batch_size where not given."""

    def _check_evaluation(self) -> None:
        check_least(self, 1, "eval_steps", "per_device_eval_batch_size")
