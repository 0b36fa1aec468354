"""The Trainer of engines that spread the parameters: it takes the model as it is, and saves and loads wholes.

Transformers leaves a model alone that it has itself spread while loading it; this trainer says so of a model that an
engine has spread, and does what Transformers would then do for its own kind.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sftcore.train.distributed.spread import SpreadEngine, whole_state
from sftcore.train.trainer import SftTrainer

_SCHEDULER = "scheduler.pt"


class SpreadTrainer(SftTrainer):
    """A Trainer whose model is spread over ranks by its engine."""

    engine: SpreadEngine

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # autocast and compilation alone are prepared, nothing is wrapped; said this late, it does not refuse to save
        # an optimizer
        self.is_distributed_loading_by_transformers = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The engine has placed the model."""

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """All ranks began with the same whole model."""

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        return self.engine.accumulating(self.model)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self.engine.clip_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self.engine.clip_gradients(model, math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        self.engine.settle(self.model)
        state_dict = whole_state(self.engine, self.model)
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.engine.settle(self.model)
        self.engine.save_optimizer(self._plain_optimizer(), Path(output_dir))
        if self.args.should_save:
            with warnings.catch_warnings():
                # it asks to save the optimizer too
                warnings.simplefilter("ignore")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def load_state(self, checkpoint: str | None) -> None:
        """Loads this rank's part of the optimizer, and the scheduler."""
        assert checkpoint is not None
        self.engine.settle(self.model)
        self.engine.load_optimizer(self._plain_optimizer(), Path(checkpoint))
        state = torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *rest: Any, **named: Any) -> None:
        self.engine.settle(self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, *rest, **named)

    def _load_best_model(self) -> None:
        self.engine.settle(self.model)
        super()._load_best_model()

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer inside that of accelerate."""
        assert self.optimizer is not None
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner
