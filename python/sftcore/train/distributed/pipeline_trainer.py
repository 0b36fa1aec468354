"""The Trainer of a stage: its loop is Transformers' own, and an optimizer step is a schedule of the pipeline.

The first micro-batch of a step runs them all; the others find their losses recorded. So logs, evaluation, callbacks
and the ledger are those of any run. Gradients are averaged over pipelines, those of a weight that first and last stage
share are added, and the norm is that of all stages. A stage writes its own part of a checkpoint, and rank 0 joins them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sftcore.models.checkpointing import activations_of
from sftcore.train.distributed.pipeline import PipelineEngine
from sftcore.train.distributed.pipeline_parts import join_adapter, join_weights
from sftcore.train.distributed.pipeline_run import PipelineLosses
from sftcore.train.loss import TokenLosses
from sftcore.train.trainer import SftTrainer

_BUCKET = 2**23
"""The gradients that are averaged together, in numbers."""


class _OfStage(nn.Module):
    """Holds a stage, so that accelerate does not wrap it in DDP, which would average over all stages."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class PipelineTrainer(SftTrainer):
    """A Trainer of one stage of a pipeline."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert isinstance(self.engine, PipelineEngine)
        assert isinstance(self.method, PipelineLosses)
        self.stages: PipelineEngine = self.engine
        self.pipeline: PipelineLosses = self.method
        self._batches: list[dict[str, Any]] = []
        self._recorded: list[TokenLosses] | None = None
        self._scale: Tensor | float = 1.0

        self.pipeline.run.around = self._around

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        """A block for each forward pass of the stage."""
        with activations_of(self.config, self.model.parameters), self.accelerator.autocast():
            yield

    # -- a step --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *arguments: Any) -> Any:
        """The micro-batches of a step, which will run as one schedule."""
        batches, num_items = super().get_batch_samples(*arguments)
        self._batches, self._recorded = list(batches), None
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch; the first one of a step runs all of them."""
        if self._recorded is None:
            model.train()
            if callable(getattr(self.optimizer, "train", None)):
                self.optimizer.train()
            # as in `compute_loss`: the count is that of all pipelines, over which gradients are averaged
            self._scale = self.engine.gradient_ranks / num_items_in_batch
            batches = [self._prepare_inputs(batch) for batch in self._batches]
            self._recorded = self.pipeline.of_all(batches, self._scale)
            for batch, losses in zip(batches, self._recorded, strict=True):
                self.tally.add(batch, losses)
            self._join_gradients()
            self._recorded.reverse()
        del inputs
        return self.finite.note(self._recorded.pop().total * self._scale)

    def take_gradients(self, batch: dict[str, Any]) -> None:
        """Runs a step of nothing but this micro-batch, as those under way take memory together."""
        count = max(1, int((batch["labels"][:, 1:] != -100).sum()))
        inputs = self._prepare_inputs(dict(batch))
        self.pipeline.of_all([inputs] * self.args.gradient_accumulation_steps, 1 / count)

    def _join_gradients(self) -> None:
        """Averages gradients over pipelines, and adds those of a weight in two stages."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        shared, count = self._shared_weight(), self.engine.gradient_ranks
        for one in parameters if count > 1 else [shared]:
            if one is not None and one.grad is None:
                # no token of this rank is trained, and others wait for its part
                one.grad = torch.zeros_like(one)
        if count > 1:
            _average(parameters, self.engine.data_group, count)
        if shared is not None:
            dist.all_reduce(shared.grad, group=self.stages.ends)

    def _shared_weight(self) -> nn.Parameter | None:
        """Returns the trained weight that the other end of the pipeline has too."""
        parts = self.stages.parts
        assert parts is not None
        if not parts.shares_embedding:
            return None
        weight: nn.Parameter = parts.model.get_submodule(parts.embedding).weight
        return weight if weight.requires_grad else None

    def _norm(self) -> Tensor:
        """Returns the norm of the gradients of all stages, each weight once."""
        parts = self.stages.parts
        assert parts is not None
        twice = self._shared_weight() if parts.is_last else None
        own = [p.grad for p in self.model.parameters() if p.grad is not None and p is not twice]
        square = get_total_norm(own).float().square().to(self.args.device)
        dist.all_reduce(square, group=self.stages.group)
        return square.sqrt()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._norm()
        clip_grads_with_norm_(list(model.parameters()), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self._norm() if grad_norm is None else grad_norm)

    def _wrap_model(
        self,
        model: nn.Module,
        training: bool = True,
        dataloader: Any = None,  # noqa: ARG002
    ) -> nn.Module:
        return _OfStage(model) if training and not isinstance(model, _OfStage) else model

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
        if self.stages.number:
            # the same numbers would drop the same places in every stage
            torch.manual_seed(self.args.seed + 7919 * self.stages.number)
        return super()._prepare_for_training(*arguments, **named)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *arguments: Any, **named: Any) -> Any:
        """Loss and accuracy over the whole evaluation set, several batches under way at a time."""
        return super().evaluation_loop(self._ahead(dataloader), *arguments, **named)  # type: ignore[arg-type]

    def _ahead(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields batches whose losses are known, so that stages do not wait for one another at each of them."""
        iterator = iter(batches)
        while group := list(itertools.islice(iterator, 2 * self.stages.num_stages)):
            plain = [
                self._prepare_inputs({k: v for k, v in one.items() if k != "loss_weights"})
                for one in group
            ]
            for batch, losses in zip(group, self.pipeline.of_all(plain), strict=True):
                self.pipeline.ready.append(losses)
                yield batch

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        is_adapter = hasattr(self.model, "peft_config")
        if self.args.should_save:
            # what is not weights, and of an adapter those of this stage
            super()._save(output_dir, state_dict if is_adapter else {})
        if self.engine.world.data_rank:
            return
        parts = self.stages.parts
        assert parts is not None
        # Transformers removes files of weights that it has not written itself
        dist.barrier(group=self.stages.group)
        join = join_adapter if is_adapter else join_weights
        join(self.model, parts, self.stages.group, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.stages.number and not self.engine.world.data_rank:
            torch.save(self.optimizer.state_dict(), self._file_of(OPTIMIZER_NAME, output_dir))
            # it has a rate for each group of parameters, which stages may have more or less of
            torch.save(self.lr_scheduler.state_dict(), self._file_of(SCHEDULER_NAME, output_dir))

    def load_state(self, checkpoint: str | None) -> None:
        """Loads what this stage has of the optimizer, and its scheduler."""
        if checkpoint is None:
            return
        optimizer = self._file_of(OPTIMIZER_NAME, checkpoint)
        scheduler = self._file_of(SCHEDULER_NAME, checkpoint)
        state = torch.load(optimizer, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def _file_of(self, name: str, folder: str) -> Path:
        number, path = self.stages.number, Path(name)
        return Path(folder) / (f"{path.stem}-stage-{number}{path.suffix}" if number else name)


def _average(parameters: list[nn.Parameter], group: Any, count: int) -> None:
    """Replaces gradients by their mean over the ranks of a group, many at a time."""
    bucket: list[Tensor] = []
    for place, parameter in enumerate(parameters):
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        following = parameters[place + 1].grad if place + 1 < len(parameters) else None
        is_full = sum(one.numel() for one in bucket) >= _BUCKET
        if following is None or is_full or following.dtype != parameter.grad.dtype:
            flat = torch.cat([one.reshape(-1) for one in bucket])
            dist.all_reduce(flat, group=group)
            flat /= count
            parts = torch.split(flat, [one.numel() for one in bucket])
            for one, part in zip(bucket, parts, strict=True):
                one.copy_(part.view_as(one))
            bucket = []
