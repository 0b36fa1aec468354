"""Micro-batches through the stages of a pipeline, forward and backward, and their losses to all ranks.

In come the micro-batches of a step, the same on each rank of a pipeline; out come the losses of their trained tokens,
and gradients where they are trained. The order of forward and backward passes and the transfers are those of
`torch.distributed.pipelining`, which wants tensors of one shape: hidden states go over the wire as rows of tokens,
filled up to those of the largest micro-batch, while each stage computes on the micro-batch as it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional

from sftcore.train.distributed.stages import Parts
from sftcore.train.head import causal_model, shift
from sftcore.train.inputs import model_inputs
from sftcore.train.loss import TokenLosses
from sftcore.train.method import LossMethod

# wires of like length are one shape, so that buffers are made anew less often
_ROUND = 64
# what the losses want and a decoder does not
_NOT_OF_DECODER = ("labels", "loss_weights")


class Fed:
    """The model of the last stage, which takes hidden states where a caller gives tokens."""

    def __init__(self, model: Any, hidden: Tensor) -> None:
        self.module = model
        self.hidden = hidden

    def __call__(self, **inputs: Any) -> Any:
        """Returns what the model returns."""
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return self.module(**rest, inputs_embeds=self.hidden)


class _Stage(nn.Module):
    """What torch runs for a micro-batch; it knows the micro-batch by its number."""

    def __init__(self, compute: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        return self.compute(received, int(number))


class _LeanStage(PipelineStage):
    """A stage that has buffers for the micro-batches under way, where torch (2.13) keeps some for all of a step."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        _fill(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _fill(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        if self.has_backward:
            # the backward pass of this micro-batch is over
            _empty(self.args_recv_info[bwd_chunk_id])
            _empty(self.grad_recv_info.get(bwd_chunk_id, ()))
        return operations

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _empty(infos)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _empty(infos)


def _fill(infos: Iterable[Any], device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg and info.tensor_meta is not None:
            meta = info.tensor_meta
            info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=device)


def _empty(infos: Iterable[Any]) -> None:
    for info in infos:
        info.buffer = None


class PipelineRun:
    """Runs micro-batches through the stages.

    Attributes:
        around: Makes the context of each forward pass of a stage.
    """

    def __init__(
        self,
        model: Any,
        parts: Parts,
        *,
        group: Any,
        dtype: torch.dtype,
        order: Literal["1f1b", "gpipe"],
    ) -> None:
        """Takes the model of this rank.

        Args:
            model: With its tuner.
            parts: Its stage.
            group: The ranks of the pipeline, in the order of their stages.
            dtype: That of hidden states between stages.
            order: The schedule for training.
        """
        self.model = model
        self.parts = parts
        self.group = group
        self.dtype = dtype
        self.order = order
        self.device = next(parts.model.parameters()).device
        self.around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.num_stages = len(parts.split.layers)
        self.last_rank = dist.get_global_rank(group, self.num_stages - 1)
        self._inputs: list[dict[str, Any]] = []
        self._at_end: Callable[[Any, int], Tensor] | None = None
        self._schedules: dict[bool, tuple[tuple[int, int], Any]] = {}
        self._tokens = 0

    def run(
        self, inputs: list[dict[str, Any]], at_end: Callable[[Any, int], Tensor], *, trains: bool
    ) -> None:
        """Runs micro-batches; every rank of the pipeline calls it with the same ones.

        Args:
            inputs: The arguments of the model for each of them.
            at_end: On the last stage, from a model that takes these arguments and the number of the micro-batch to
                the scalar whose gradients are taken.
            trains: Whether they are.
        """
        self._inputs, self._at_end = inputs, at_end
        longest = max(one["input_ids"].numel() for one in inputs)
        self._tokens = math.ceil(longest / _ROUND) * _ROUND
        schedule = self._schedule(len(inputs), trains=trains)
        numbers = torch.arange(len(inputs))
        first = (numbers,) if self.parts.is_first else ()
        try:
            if trains:
                target = numbers if self.parts.is_last else None
                schedule.step(*first, target=target, return_outputs=False, number=numbers)
            else:
                with torch.no_grad():
                    schedule.eval(*first, return_outputs=False, number=numbers)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # torch wraps what a stage raises
        finally:
            self._inputs, self._at_end = [], None

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """Returns the logits of a batch on every rank."""
        shape = inputs["input_ids"].shape
        vocabulary = self.parts.model.config.get_text_config().vocab_size
        found = torch.empty(*shape, vocabulary, dtype=torch.float32, device=self.device)

        def at_end(model: Any, _: int) -> Tensor:
            found.copy_(model(**inputs, use_cache=False).logits)
            return found.sum()

        self.run([inputs], at_end, trains=False)
        dist.broadcast(found, src=self.last_rank, group=self.group)
        return found

    def share(self, found: list[TokenLosses], sizes: list[int]) -> list[TokenLosses]:
        """Gives the losses of the last stage to all stages.

        Args:
            found: On the last stage, those of each micro-batch.
            sizes: The trained tokens of each micro-batch.
        """
        count = len(sizes)
        flat = torch.empty(count + 2 * sum(sizes), dtype=torch.float32, device=self.device)
        if self.parts.is_last:
            parts = [torch.stack([one.total.detach().reshape(()) for one in found])]
            parts += [one.losses for one in found] + [one.right.float() for one in found]
            torch.cat([part.float() for part in parts], out=flat)
        dist.broadcast(flat, src=self.last_rank, group=self.group)
        totals, losses, right = torch.split(flat, [count, sum(sizes), sum(sizes)])
        return [
            TokenLosses(total, loss, is_right.bool())
            for total, loss, is_right in zip(
                totals, torch.split(losses, sizes), torch.split(right, sizes), strict=True
            )
        ]

    def _schedule(self, count: int, *, trains: bool) -> Any:
        key = (count, self._tokens)
        if trains in self._schedules and self._schedules[trains][0] == key:
            return self._schedules[trains][1]
        self._schedules.pop(trains, None)  # its buffers go before others are made
        width = self.parts.model.config.get_text_config().hidden_size
        # examples of what goes over the wire, which have no memory
        wire = torch.empty(self._tokens, width, dtype=self.dtype, device="meta")
        end = torch.empty((), dtype=torch.float32, device="meta")
        stage = _LeanStage(
            _Stage(self._compute),
            self.parts.number,
            self.num_stages,
            self.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta")
            if self.parts.is_first
            else wire.requires_grad_(trains),
            output_args=(end if self.parts.is_last else wire).requires_grad_(trains),
            group=self.group,
        )
        # with fewer micro-batches than stages, both orders are the same
        kind = Schedule1F1B if self.order == "1f1b" and count >= self.num_stages else ScheduleGPipe
        if trains:
            schedule: Any = kind(stage, count, loss_fn=_same, scale_grads=False)
        else:
            schedule = ScheduleGPipe(stage, count)
        self._schedules[trains] = (key, schedule)
        return schedule

    def _compute(self, received: Tensor, number: int) -> Tensor:
        inputs = self._inputs[number]
        shape = inputs["input_ids"].shape
        with self.around():
            if self.parts.is_last:
                assert self._at_end is not None
                return self._at_end(Fed(self.model, self._hidden(received, shape)), number)
            rest = {name: value for name, value in inputs.items() if name not in _NOT_OF_DECODER}
            if not self.parts.is_first:
                del rest["input_ids"]
                rest["inputs_embeds"] = self._hidden(received, shape)
            decoder = causal_model(self.model).base_model
            output = decoder(**rest, use_cache=False).last_hidden_state
        flat = output.reshape(shape.numel(), -1).to(self.dtype)
        return functional.pad(flat, (0, 0, 0, self._tokens - len(flat)))

    def _hidden(self, received: Tensor, shape: torch.Size) -> Tensor:
        return received[: shape.numel()].view(*shape, -1)


class WholeModel:
    """Stands for the whole model in checks that look at logits; every rank of the pipeline calls it."""

    def __init__(self, run: PipelineRun) -> None:
        self.run = run
        self.model = run.parts.model

    def __call__(self, *, use_cache: bool = False, **inputs: Any) -> Any:
        """Returns an object with `logits`."""
        assert not use_cache
        return SimpleNamespace(logits=self.run.logits(inputs))

    def get_input_embeddings(self) -> Any:
        """Returns an object whose `weight` is as long as the vocabulary, on the device of the model."""
        length = self.model.config.get_text_config().vocab_size
        return SimpleNamespace(weight=torch.empty(length, 0, device=self.run.device))

    def parameters(self) -> Any:
        """Returns the parameters of this stage."""
        return self.model.parameters()

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return bool(self.model.training)

    def eval(self) -> None:
        """Puts the model into evaluation mode."""
        self.model.eval()

    def train(self, mode: bool = True) -> None:
        """Puts the model into training mode, or out of it."""
        self.model.train(mode)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineLosses(LossMethod):
    """The losses of batches by all stages; every rank of a pipeline asks for those of the same batches.

    Attributes:
        run: Runs the stages.
        local: How the last stage computes losses; None on the others.
        ready: The losses of the batch that is asked for next, where they are known already.
    """

    run: PipelineRun
    local: LossMethod | None
    ready: list[TokenLosses] = field(default_factory=list)

    def losses(self, model: Any, batch: dict[str, Any]) -> tuple[TokenLosses, Tensor | None]:  # noqa: ARG002
        """Returns the losses of a batch, without gradients.

        Args:
            model: The model of this stage, which the run has too.
            batch: A batch of the loader, on the device of the model.
        """
        if self.ready:
            return self.ready.pop(), None
        return self.of_all([batch])[0], None

    def of_all(
        self, batches: list[dict[str, Any]], scale: Tensor | float | None = None
    ) -> list[TokenLosses]:
        """Returns the losses of batches that go through the stages one behind the other.

        Args:
            batches: Of the loader, on the device of the model.
            scale: What the loss of a batch is multiplied by to take its gradients; None takes none.
        """
        found: dict[int, TokenLosses] = {}

        def at_end(model: Any, number: int) -> Tensor:
            assert self.local is not None
            losses, extra = self.local.losses(model, batches[number])
            assert extra is None
            found[number] = TokenLosses(losses.total.detach(), losses.losses, losses.right)
            return losses.total if scale is None else losses.total * scale

        inputs = [model_inputs(batch, self.kind) for batch in batches]
        self.run.run(inputs, at_end, trains=scale is not None)
        sizes = [int((shift(batch["labels"], -100) != -100).sum()) for batch in batches]
        return self.run.share([found[number] for number in sorted(found)], sizes)


def _same(output: Tensor, _: Tensor) -> Tensor:
    return output
