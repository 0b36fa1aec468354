"""A loss or gradient that is not finite: caught before it reaches the weights, and led back to its rows.

In come the micro-batches of an optimizer step, their losses and the norm of the gradients. Where one of these is NaN
or infinite, the micro-batch is run again row by row with the same weights, and the rows that cause it are named
by file and line. The step is looked at once, where all ranks meet, so they stop or skip it together. An overflow of
float16 gradients, which the scaler answers by itself, is no error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sftcore.data import BatchLoader, StreamLoader
from sftcore.errors import NonFiniteError
from sftcore.train.examples import single_examples
from sftcore.train.loaders import say

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sftcore.train.distributed.engine import Engine
    from sftcore.train.method import LossMethod

NON_FINITE_FILE = "non_finite.json"
_MAX_IN_A_ROW = 20
_MAX_KEPT = 100
_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A row, where it stands.

    Attributes:
        row: Its number in the loader.
        path: Its file; None for the rows of a stream.
        line: Its line in that file.
        source: The name of its data set; None for the rows of a stream.
    """

    row: int
    path: str | None
    line: int | None
    source: str | None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.path else f"row {self.row} of the stream"


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """A row that was run again for itself.

    Attributes:
        place: Where it stands.
        rank: The process that had it.
        micro_batch: Its micro-batch in the optimizer step, from 1.
        loss: The sum of the losses of its tokens.
        gradient: Whether that is finite and its gradient is not.
        text: How it begins, as the model sees it.
    """

    place: Place
    rank: int
    micro_batch: int
    loss: float
    gradient: bool
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {'its gradient' if self.gradient else f'loss {self.loss}'}"

    def to_json(self) -> dict[str, Any]:
        """Returns it as values that JSON can hold."""
        values = asdict(self)
        return {
            **values.pop("place"),
            **values,
            "loss": self.loss if math.isfinite(self.loss) else str(self.loss),
        }


class FiniteGuard:
    """Watches the optimizer steps of a run."""

    def __init__(
        self,
        *,
        loader: BatchLoader | StreamLoader,
        method: LossMethod,
        accelerator: Accelerator,
        engine: Engine,
        folder: Path,
        skips: bool,
    ) -> None:
        """Watches nothing yet.

        Args:
            loader: Knows where rows stand.
            method: From a batch to its losses.
            accelerator: Knows the gradient scaler.
            engine: Knows the other ranks.
            folder: The run folder.
            skips: Whether such steps are left out, in place of an error.
        """
        self.loader = loader
        self.method = method
        self.accelerator = accelerator
        self.engine = engine
        self.folder = folder
        self.skips = skips
        self.num_skipped = 0
        """The optimizer steps that were left out so far."""
        self.is_skipped = False
        """Whether the step under way is left out; its gradients are None then."""
        self._in_a_row = 0
        self._skipped_since_log = 0
        self._first_step: int | None = None
        self._logged_step = 0
        self._events: list[dict[str, Any]] = []
        self._batches: Sequence[dict[str, Any]] = ()
        self._losses: list[Tensor] = []
        self._num_items: Tensor | int | None = None

    def begin(self, batches: Sequence[dict[str, Any]], num_items: Tensor | int | None) -> None:
        """Takes the micro-batches of the step that comes, and what their losses are divided by."""
        self._batches, self._losses = batches, []
        self._num_items = num_items
        self.is_skipped = False

    def note(self, loss: Tensor) -> Tensor:
        """Takes the loss of the next micro-batch, and returns it, or 0 where it is not finite, to be logged."""
        self._losses.append(loss.detach())
        return loss.where(torch.isfinite(loss), 0.0)

    def check(
        self, model: Any, norm: Tensor | float | None, *, step: int, logged_step: int
    ) -> Tensor | float | None:
        """Looks at a step whose gradients are there, before they reach the weights.

        Args:
            model: As it is trained.
            norm: Of the gradients.
            step: The optimizer steps before this one.
            logged_step: How many of them the last log had seen.

        Returns:
            The norm; None where it is not finite and the step does not count.

        Raises:
            NonFiniteError: Something is not finite and such steps are not skipped, or too many were in a row.
        """
        self._first_step = step if self._first_step is None else self._first_step
        self._logged_step = logged_step
        device = self._losses[0].device
        values = [loss.float().reshape(()) for loss in self._losses]
        if norm is not None:
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(()))
        wrong = ~torch.isfinite(torch.stack(values))
        num_losses = len(self._losses)
        counts = torch.stack([wrong[:num_losses].sum(), wrong[num_losses:].sum()]).float()
        in_losses, in_norm = self.engine.reduce(counts).tolist()
        if not in_losses and not in_norm:
            self._in_a_row = 0
            return norm
        scales = self.accelerator.scaler is not None or self.engine.scales_loss
        if not in_losses and scales:
            return None  # the scaler leaves the step out and scales less
        self._examine(model, step + 1, wrong[:num_losses].tolist(), in_losses=bool(in_losses))
        self._skip(model)
        return None

    def amend(self, logs: dict[str, float], step: int) -> dict[str, float]:
        """Returns what is logged, with losses that are means over the steps that were not left out.

        Args:
            logs: With `loss` since the last log, or `train_loss` of the whole run, where steps left out are 0.
            step: The optimizer steps so far.
        """
        if not self.num_skipped:
            return logs
        amended = dict(logs)
        since = {
            "loss": (self._logged_step, self._skipped_since_log),
            "train_loss": (self._first_step or 0, self.num_skipped),
        }
        for name, (start, skipped) in since.items():
            if name not in logs:
                continue
            amended["skipped_steps"] = float(self.num_skipped)
            if step - start > skipped:
                amended[name] = logs[name] * (step - start) / (step - start - skipped)
            else:
                del amended[name]  # there is no step to speak of
        if "loss" in logs:
            self._skipped_since_log = 0
        return amended

    def skipped_loss(self) -> Tensor:
        """Returns what the finite micro-batches of the step that is left out have added to the logged loss."""
        losses = torch.stack([loss.reshape(()) for loss in self._losses])
        return losses.where(torch.isfinite(losses), 0.0).sum()

    def _skip(self, model: Any) -> None:
        self.is_skipped = True
        self.num_skipped += 1
        self._skipped_since_log += 1
        self._in_a_row += 1
        if self._in_a_row >= _MAX_IN_A_ROW:
            raise NonFiniteError(
                f"{_MAX_IN_A_ROW} optimizer steps in a row were left out, as their losses or gradients are not "
                f"finite; lower --learning_rate, or look at the rows in {self.folder / NON_FINITE_FILE}"
            )
        if self.accelerator.scaler is None:
            # an optimizer leaves alone what has no gradient; a scaler skips the step by itself
            for parameter in model.parameters():
                parameter.grad = None

    def _examine(self, model: Any, step: int, wrong: list[bool], *, in_losses: bool) -> None:
        """Finds the rows, writes them down, and raises where the step is not skipped."""
        of_ranks = self.engine.gather_objects([self._culprits(model, wrong, in_losses=in_losses)])
        alone = any(is_alone and part for part, is_alone in of_ranks)
        found = [culprit for part, is_alone in of_ranks if is_alone == alone for culprit in part]
        what = "the loss" if in_losses else "the norm of the gradients"
        which = sorted({culprit.micro_batch for culprit in found})
        weights = _non_finite_weights(model)
        event = {
            "step": step,
            "what": what,
            "micro_batches": which,
            "num_micro_batches": len(wrong),
            "each_alone": alone,
            "weights": weights,
            "rows": [culprit.to_json() for culprit in found],
        }
        self._events = [*self._events, event][:_MAX_KEPT]
        path = self.folder / NON_FINITE_FILE
        if self.engine.world.is_first:
            values = {"num_steps": self.num_skipped + 1, "first_steps": self._events}
            path.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
        cause = "caused by" if alone else "no row causes it alone; it had"
        text = f"step {step}: {what} is not finite, {cause} {first(found)}"
        if weights:
            text += f"; weights that are not finite: {', '.join(weights)}"
        if not self.skips:
            raise NonFiniteError(
                f"{text}; see {path}, look at these rows, lower --learning_rate, or pass --on_non_finite skip to leave "
                "such steps out"
            )
        if self.engine.world.is_first:
            say(f"warning: {text}; the step is left out")

    def _culprits(
        self, model: Any, wrong: list[bool], *, in_losses: bool
    ) -> tuple[list[Culprit], bool]:
        """Returns the rows of this rank that are at fault for themselves, and True; else all that may be."""
        chosen = [
            (number, batch)
            for number, batch in enumerate(self._batches)
            if wrong[number] or not in_losses
        ]
        whole = [
            self._culprit(row, example, number, math.nan, gradient=not in_losses)
            for number, batch in chosen
            for row, example in single_examples(batch)
        ]
        if self.engine.shares_weights or not (in_losses or self.engine.runs_alone):
            # to run a row, all ranks would have to run one, and they do not have equally many
            return whole, False
        plain = self.accelerator.unwrap_model(model)
        was_training = plain.training
        plain.eval()
        try:
            found = [
                culprit
                for number, batch in chosen
                for row, example in single_examples(batch)
                if (culprit := self._try(plain, row, example, number, in_losses=in_losses))
            ]
        finally:
            plain.train(was_training)
        return (found, True) if found or not chosen else (whole, False)

    def _try(
        self, model: Any, row: int, example: dict[str, Any], number: int, *, in_losses: bool
    ) -> Culprit | None:
        device = self.accelerator.device
        inputs = {name: value.to(device) for name, value in example.items()}
        with torch.set_grad_enabled(not in_losses):
            losses, _ = self.method.losses(model, inputs)
        loss = float(losses.total.detach())
        if not math.isfinite(loss):
            return self._culprit(row, example, number, loss, gradient=False)
        if in_losses:
            return None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # not backward(): the gradients of the step, and the hooks that add them over ranks, are left alone
        loss_of_step = losses.total / (1 if self._num_items is None else int(self._num_items))
        gradients = torch.autograd.grad(loss_of_step, trained, allow_unused=True)
        norms = [part.float().norm() for part in gradients if part is not None]
        # the norm overflows before its parts do
        if bool(torch.isfinite(torch.stack(norms).norm())):
            return None
        return self._culprit(row, example, number, loss, gradient=True)

    def _culprit(
        self, row: int, example: dict[str, Any], number: int, loss: float, *, gradient: bool
    ) -> Culprit:
        ids = example["input_ids"][0, :60].tolist()
        return Culprit(
            place=places_of(self.loader, [row])[0],
            rank=self.engine.world.rank,
            micro_batch=number + 1,
            loss=loss,
            gradient=gradient,
            text=self.loader.encoder.decode(ids, skip_special_tokens=False),
        )


def places_of(loader: BatchLoader | StreamLoader, rows: Sequence[int]) -> list[Place]:
    """Returns where rows stand; a stream knows no more than their numbers."""
    places = []
    for row in rows:
        place = Place(row=row, path=None, line=None, source=None)
        if isinstance(loader, BatchLoader):
            path, line = loader.place(row)
            place = replace(place, path=str(path), line=line, source=loader.source_of(row))
        places.append(place)
    return places


def first(found: Sequence[object]) -> str:
    """Returns the first of many as a text, and how many more there are."""
    more = len(found) - _SHOWN
    shown = ", ".join(str(one) for one in found[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def _non_finite_weights(model: Any) -> list[str]:
    """Returns the names of the first parameters that hold a value that is not finite."""
    names = []
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        is_finite = torch.isfinite(parameter.detach()).all()
        # of a parameter that is spread over ranks, all of them look at their part
        if not bool(is_finite.full_tensor() if isinstance(is_finite, DTensor) else is_finite):
            names.append(name)
            if len(names) == 3:
                break
    return names
