"""How weights are updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftcore.config.ranges import check_least, check_positive, check_range, check_share


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Optimization. How weights are updated."""

    learning_rate: float | None = None
    """The highest learning rate; 1e-4 for adapters and 1e-5 for full where not given."""
    per_device_train_batch_size: int = 1
    """Examples of a micro-batch."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches of an optimizer step; enough for 16 examples a step where not given."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps, in place of --num_train_epochs; -1 leaves it to the epochs."""
    optim: str = "adamw_torch"
    """The optimizer, by its name in Transformers."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """The decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """The decay of the mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.0
    """The share of all steps in which the learning rate rises from 0."""
    seed: int = 42
    """Decides the initial LoRA weights, dropout and, without --data_seed, the order of the data."""

    def _check_optimization(self) -> None:
        check_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        check_positive(self, "learning_rate", "num_train_epochs")
        check_least(self, 0, "weight_decay", "max_grad_norm")
        check_share(self, "adam_beta1", "adam_beta2", "warmup_ratio")
        is_right = self.max_steps == -1 or self.max_steps >= 1
        check_range("max_steps", self.max_steps, "1 or more, or -1", holds=is_right)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of an optimizer step on each of `world_size` ranks."""
        if self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps
        return max(1, -(-16 // (self.per_device_train_batch_size * world_size)))
