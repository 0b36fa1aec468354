"""The settings of `sftcore train`: one dataclass a concern, and what they ask of each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sftcore.config.checkpoints import CheckpointConfig
from sftcore.config.data import DataConfig
from sftcore.config.evaluation import EvaluationConfig
from sftcore.config.finite import FiniteConfig
from sftcore.config.loss import LossConfig
from sftcore.config.memory import MemoryConfig
from sftcore.config.model import ModelConfig
from sftcore.config.optimization import MEASURED, OptimizationConfig
from sftcore.config.output import OutputConfig
from sftcore.config.parallel import ParallelConfig
from sftcore.config.quantization import QuantizationConfig
from sftcore.config.ranges import default_of
from sftcore.config.trainer import TrainerConfig
from sftcore.config.tuner import TunerConfig
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    TrainerConfig,
    OutputConfig,
    CheckpointConfig,
    EvaluationConfig,
    FiniteConfig,
    MemoryConfig,
    ParallelConfig,
    LossConfig,
    OptimizationConfig,
    QuantizationConfig,
    TunerConfig,
    DataConfig,
    ModelConfig,
):
    """All settings of a training run."""

    def __post_init__(self) -> None:
        self._check_data()
        self._check_tuner()
        self._check_quantization()
        self._check_quantized_tuner(self)
        self._check_optimization()
        self._check_loss()
        self._check_memory()
        self._check_parallel()
        has_rows = bool(self.val_dataset) or self.holds_out
        self._check_evaluation(has_rows=has_rows)
        self._check_checkpoints()
        self._check_output()
        for name in ("save_strategy", "lr_scheduler_type"):
            value = getattr(self, name)
            if value in (*MEASURED, "best") and not (has_rows and self.eval_strategy != "no"):
                raise ConfigError(
                    f"--{name} {value} follows an evaluation, and there is none: pass --val_dataset or "
                    "--split_dataset_ratio, and leave out --eval_strategy no"
                )
        self._check_trainer()
        if self.tokens_per_batch and self.per_device_train_batch_size != 1:
            raise ConfigError(
                "--tokens_per_batch and --per_device_train_batch_size exclude each other"
            )
        is_split = self.split_dataset_ratio not in (
            0,
            default_of(DataConfig, "split_dataset_ratio"),
        )
        for name, is_given, other, has_other in (
            ("val_dataset", self.val_dataset, "eval_strategy no", self.eval_strategy == "no"),
            ("split_dataset_ratio", is_split, "eval_strategy no", self.eval_strategy == "no"),
            ("split_dataset_ratio", is_split, "val_dataset", self.val_dataset),
            ("split_dataset_ratio", is_split, "streaming true", self.streaming),
        ):
            if is_given and has_other:
                raise ConfigError(f"--{name} has no effect with --{other}")
        if self.streaming and self.eval_strategy == "epoch":
            raise ConfigError("--streaming knows no end of an epoch; set --eval_strategy steps")
        if self.streaming and self.test_oom:
            raise ConfigError("--test_oom needs an index of the data; leave out --streaming")
        if self.streaming and self.max_steps == -1:
            raise ConfigError("--streaming knows no end of the data; set --max_steps")

    @property
    def holds_out(self) -> bool:
        """Whether a part of the data is kept for evaluation."""
        return (
            self.split_dataset_ratio > 0
            and not self.val_dataset
            and not self.streaming
            and self.eval_strategy != "no"
        )

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate, also where none is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if self.trains_weights else 1e-4

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as `--config` takes them back."""
        return asdict(self)
