"""The settings of `sftcore train`: one dataclass a concern, and what they ask of each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sftcore.config.checkpoints import CheckpointConfig
from sftcore.config.data import DataConfig
from sftcore.config.evaluation import EvaluationConfig
from sftcore.config.loss import LossConfig
from sftcore.config.memory import MemoryConfig
from sftcore.config.model import ModelConfig
from sftcore.config.optimization import OptimizationConfig
from sftcore.config.output import OutputConfig
from sftcore.config.tuner import TunerConfig
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    OutputConfig,
    CheckpointConfig,
    EvaluationConfig,
    MemoryConfig,
    LossConfig,
    OptimizationConfig,
    TunerConfig,
    DataConfig,
    ModelConfig,
):
    """All settings of a training run."""

    def __post_init__(self) -> None:
        self._check_data()
        self._check_tuner()
        self._check_optimization()
        self._check_loss()
        self._check_memory()
        self._check_evaluation()
        self._check_checkpoints()
        self._check_output()
        if self.tokens_per_batch and self.per_device_train_batch_size != 1:
            raise ConfigError(
                "--tokens_per_batch and --per_device_train_batch_size exclude each other"
            )
        if self.streaming and self.test_oom:
            raise ConfigError("--test_oom needs an index of the data; leave out --streaming")
        if self.streaming and self.max_steps == -1:
            raise ConfigError("--streaming knows no end of the data; set --max_steps")

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate, also where none is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.tuner_type == "lora" else 1e-5

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the model itself are trained, not an adapter beside them."""
        return self.tuner_type in ("full", "freeze")

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as `--config` takes them back."""
        return asdict(self)
