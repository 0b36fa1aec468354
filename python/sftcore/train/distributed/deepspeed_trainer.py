"""The Trainer under DeepSpeed: what DeepSpeed saves, loads and steps by itself.

DeepSpeed clips, steps and clears gradients at the end of the last backward pass of a step, so what the Trainer does
there finds it done: a step whose gradients are not finite has been left out by then. Its state is loaded where
that of a plain optimizer would be, so that settings that changed count in a resumed run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from sftcore.train.distributed.deepspeed import DeepSpeedEngine
from sftcore.train.distributed.partitioned import load_weights
from sftcore.train.resume import fitting
from sftcore.train.trainer import SftTrainer


class DeepSpeedTrainer(SftTrainer):
    """A Trainer whose model and optimizer are in the hands of DeepSpeed."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        engine = self._engine()
        if resume_from_checkpoint is not None and self.config.resume_only_model:
            # before DeepSpeed makes its own copies of the weights
            self._load_from_checkpoint(resume_from_checkpoint)
        engine.hand_over()
        # what accelerate would take from DeepSpeed's settings, with a warning
        self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if not engine.scales_loss:
            # a step that is left out counts in the schedule, as without DeepSpeed; one that overflows does not
            self.optimizer.__has_overflow__ = False
        if engine.stage == 0:
            self.accelerator.deepspeed_engine_wrapped = WatchedSteps(self.model_wrapped)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def load_state(self, checkpoint: str | None) -> None:
        """Loads weights, optimizer and scheduler from where DeepSpeed saved them."""
        assert checkpoint is not None
        # an adapter is saved without the frozen weights
        is_whole = self.config.trains_weights
        deepspeed_load_checkpoint(self.model_wrapped, checkpoint, load_module_strict=is_whole)
        super().load_state(checkpoint)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if state_dict is not None:
            join_copies(state_dict, self.model)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *rest: Any, **named: Any) -> None:
        if not self._engine().is_partitioned or not self.config.trains_weights:
            super()._load_from_checkpoint(resume_from_checkpoint, *rest, **named)
            return
        assert self.resume is not None
        folder = Path(resume_from_checkpoint)
        fitting(lambda: load_weights(self.model, folder), self.resume)

    def _engine(self) -> DeepSpeedEngine:
        assert isinstance(self.engine, DeepSpeedEngine)
        return self.engine


def join_copies(state_dict: dict[str, Any], model: torch.nn.Module) -> None:
    """Gives names of one parameter one tensor again, in place.

    Under DeepSpeed accelerate copies each tensor of the state, and a head that is the embedding would be saved twice.
    """
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if name in state_dict and known in state_dict:
            state_dict[name] = state_dict[known]


class WatchedSteps(DeepSpeedEngineWrapper):  # type: ignore[misc, unused-ignore]
    """The steps of stage 0, which knows no norm of its gradients and takes those that are not finite."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **arguments: Any) -> None:
        """Runs the backward pass, and the optimizer after the last one of a step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **arguments)
        if not sync_gradients:
            return
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        self.engine._global_grad_norm = norm
