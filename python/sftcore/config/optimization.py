"""How weights are updated."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from sftcore.config.pairs import read_pairs
from sftcore.config.ranges import (
    check_effects,
    check_least,
    check_positive,
    check_range,
    check_seed,
    check_share,
)
from sftcore.errors import ConfigError

# these follow an evaluation metric instead of the steps
MEASURED = ("reduce_lr_on_plateau", "greedy")
# these take no warm-up: the learning rate never rises, or follows what is measured
_WITHOUT_WARMUP = ("constant", *MEASURED)


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
    optim: str = "auto"
    """The optimizer, by its name in Transformers (adamw_torch, adafactor, adamw_8bit, galore_adamw, apollo_adamw,
    schedule_free_adamw, lion_8bit, ...) or torch.optim (nadam, radam, torch.optim.Adam, ...), or muon; auto is
    adamw_torch_fused where the device has it, else adamw_torch."""
    optim_args: str = "{}"
    """More arguments of the optimizer: '{"momentum": 0.9}' or momentum=0.9,nesterov=true."""
    optim_target_modules: list[str] = field(default_factory=list)
    """For GaLore and APOLLO: the linear layers whose gradients are projected, by parts of their names or a regex;
    all of them but the head where not given."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """The decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """The decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Is added to the root of the mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    lr_scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
        "greedy",
    ] = "cosine"
    """How the learning rate falls after the warm-up."""
    lr_scheduler_kwargs: str = "{}"
    """Arguments of the scheduler, like '{"min_lr_rate": 0.1}' or num_decay_steps=200,decay_type=1-sqrt."""
    warmup_steps: float = 0.0
    """Steps in which the learning rate rises from 0; below 1, their share of all steps."""
    warmup_ratio: float = 0.0
    """The share of all steps in which the learning rate rises from 0."""
    neftune_noise_alpha: float | None = None
    """Adds noise of this strength to the embeddings while training, as NEFTune does (Jain et al. 2023): 5, 10 or 15."""
    seed: int = 42
    """Decides the initial LoRA weights, dropout and, without --data_seed, the order of the data."""

    def _check_optimization(self) -> None:
        check_least(self, 1, "per_device_train_batch_size", "gradient_accumulation_steps")
        check_positive(self, "learning_rate", "num_train_epochs", "neftune_noise_alpha")
        check_least(self, 0, "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps")
        check_share(self, "adam_beta1", "adam_beta2", "warmup_ratio")
        check_seed("seed", self.seed)
        is_right = self.max_steps == -1 or self.max_steps >= 1
        check_range("max_steps", self.max_steps, "1 or more, or -1", holds=is_right)
        is_whole = self.warmup_steps < 1 or self.warmup_steps % 1 == 0
        check_range(
            "warmup_steps", self.warmup_steps, "whole steps, or a share below 1", holds=is_whole
        )
        # wrong ones are said before anything is loaded
        _ = self.optimizer_arguments, self.scheduler_arguments
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                "--warmup_steps and --warmup_ratio exclude each other: both say how long the learning rate rises"
            )
        projects = self.optim.startswith(("galore", "apollo")), "--optim galore_... or apollo_..."
        check_effects(self, OptimizationConfig, {"optim_target_modules": projects})
        try:
            _ = [re.compile(part) for part in self.optim_target_modules]
        except re.error as error:
            raise ConfigError(
                f"--optim_target_modules {' '.join(self.optim_target_modules)} is no regex: {error}"
            ) from error
        self._check_schedule()

    def _check_schedule(self) -> None:
        kind = self.lr_scheduler_type
        is_schedule_free = self.optim.startswith("schedule_free")
        if is_schedule_free and kind != "constant":
            raise ConfigError(
                f"--optim {self.optim} replaces a schedule: its learning rate stays; pass --lr_scheduler_type constant"
            )
        warms_up = kind not in _WITHOUT_WARMUP
        if is_schedule_free:
            warms_up = self.optim != "schedule_free_radam"
        name = f"--optim {self.optim}" if is_schedule_free else f"--lr_scheduler_type {kind}"
        better = "; constant_with_warmup has one" if name.endswith(" constant") else ""
        for setting in ("warmup_steps", "warmup_ratio"):
            if getattr(self, setting) and not warms_up:
                raise ConfigError(f"--{setting} has no effect with {name}{better}")
        if kind.startswith("constant") and self.scheduler_arguments:
            raise ConfigError(
                f"--lr_scheduler_kwargs has no effect with --lr_scheduler_type {kind}"
            )

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """`optim_args` as a dict.

        Raises:
            ConfigError: It is neither a JSON object nor pairs.
        """
        return read_pairs("optim_args", self.optim_args, '{"momentum": 0.9}')

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        """`lr_scheduler_kwargs` as a dict.

        Raises:
            ConfigError: It is neither a JSON object nor pairs.
        """
        return read_pairs("lr_scheduler_kwargs", self.lr_scheduler_kwargs, '{"min_lr_rate": 0.1}')

    def num_warmup_steps(self, num_steps: int) -> int:
        """Optimizer steps in which the learning rate rises, of `num_steps` in all."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return share_of(self.warmup_steps or self.warmup_ratio, num_steps)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of an optimizer step on each of `world_size` ranks."""
        if self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps
        return max(1, -(-16 // (self.per_device_train_batch_size * world_size)))


def share_of(share: float, num_steps: int) -> int:
    """Returns a share of `num_steps`, rounded up, where 0.1 of 10 is 1 although floats say a little more."""
    return -int(-round(share * num_steps, 9) // 1)
