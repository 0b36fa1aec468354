"""What is measured on rows that are not trained, when, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sftcore.config.generation import GenerationConfig
from sftcore.config.ranges import check_effects, check_least, check_range
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(GenerationConfig):
    """Evaluation. What is measured on rows that are not trained, when, and what follows from it."""

    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """Evaluates each --eval_steps or each epoch, and at the end; no holds out no rows and evaluates nothing."""
    eval_steps: int | None = None
    """Steps between two evaluations; --save_steps where not given."""
    eval_on_start: bool = False
    """Evaluates before the first step too."""
    eval_delay: float = 0.0
    """No evaluation before this many steps, or epochs with --eval_strategy epoch."""
    per_device_eval_batch_size: int | None = None
    """Examples of an evaluation batch; --per_device_train_batch_size where not given."""
    acc_strategy: Literal["token", "seq"] = "token"
    """token shows the share of trained tokens that are right; seq also that of examples all of whose tokens are."""
    metric_for_best_model: str | None = None
    """What makes a checkpoint the best; rouge-l with --predict_with_generate, else loss, where not given."""
    greater_is_better: bool | None = None
    """Whether a higher metric is better; known for each metric where not given."""
    load_best_model_at_end: bool = False
    """Puts the model of the best checkpoint into the run folder itself at the end."""
    early_stop_interval: int | None = None
    """Stops after this many evaluations in a row without a better --metric_for_best_model."""
    early_stopping_threshold: float = 0.0
    """With --early_stop_interval: better by no more than this is not better."""
    predict_with_generate: bool = False
    """Answers evaluation rows too, and compares the answers by ROUGE, BLEU and exact match."""
    predict_rows: int = 100
    """The first evaluation rows that are answered, as generation is slow; -1 answers all."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts answered and shown at each evaluation: texts, or files of prompts (.txt, .jsonl)."""
    num_sample_generations: int | None = None
    """How many of --sample_prompts, else of the evaluation rows, are answered and shown at each evaluation."""

    @property
    def generates(self) -> bool:
        """Whether an evaluation generates text."""
        return self.predict_with_generate or self.shows_samples

    @property
    def shows_samples(self) -> bool:
        """Whether an evaluation shows answers."""
        return bool(self.sample_prompts) or bool(self.num_sample_generations)

    @property
    def best_metric_name(self) -> str:
        """The metric that makes a checkpoint the best, without `eval_`."""
        default = "rouge-l" if self.predict_with_generate else "loss"
        return (self.metric_for_best_model or default).removeprefix("eval_")

    def _check_evaluation(self, *, has_rows: bool) -> None:
        """Checks ranges and effects.

        Args:
            has_rows: Whether there are rows to evaluate on, if anything is evaluated.
        """
        check_least(self, 1, "eval_steps", "per_device_eval_batch_size", "early_stop_interval")
        check_least(self, 0, "eval_delay", "early_stopping_threshold", "num_sample_generations")
        self._check_generation()
        is_right = self.predict_rows == -1 or self.predict_rows >= 1
        check_range("predict_rows", self.predict_rows, "1 or more, or -1", holds=is_right)
        if self.sample_prompts and self.num_sample_generations == 0:
            raise ConfigError("--sample_prompts has no effect with --num_sample_generations 0")
        self._check_evaluation_effects(has_rows=has_rows)

    def _check_evaluation_effects(self, *, has_rows: bool) -> None:
        evaluates = (
            has_rows,
            "evaluation rows: pass --val_dataset, or --split_dataset_ratio above 0",
        )
        if self.eval_strategy == "no":
            evaluates = False, "evaluation: leave out --eval_strategy no"
        of_answers = GenerationConfig.__dataclass_fields__
        names = EvaluationConfig.__dataclass_fields__.keys() - {"eval_strategy", *of_answers}
        check_effects(self, EvaluationConfig, dict.fromkeys(sorted(names), evaluates))
        generates = self.generates, "--predict_with_generate true or --num_sample_generations"
        check_effects(self, GenerationConfig, dict.fromkeys(of_answers, generates))
        check_effects(
            self,
            EvaluationConfig,
            {
                "eval_steps": (self.eval_strategy == "steps", "--eval_strategy steps"),
                "early_stopping_threshold": (
                    self.early_stop_interval is not None,
                    "--early_stop_interval",
                ),
                "predict_rows": (self.predict_with_generate, "--predict_with_generate true"),
            },
        )
