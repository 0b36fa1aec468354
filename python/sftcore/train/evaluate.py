"""Loss and accuracy over the trained tokens of rows that are not trained.

In come the evaluation batches of a rank, out come the numbers of all ranks. Sums and counts are added and divided
once, so no number is a mean of means, and neither batches nor layout nor ranks change it. Tokens and rows that
train nothing do not count, and weights of tokens do not enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader
from sftcore.errors import NonFiniteError
from sftcore.train.data_sets import shown_names
from sftcore.train.examples import sums_by_example
from sftcore.train.finite import first, places_of
from sftcore.train.loss import TokenLosses
from sftcore.train.predict import Predictor

if TYPE_CHECKING:
    from pathlib import Path

    from sftcore.train.distributed.engine import Engine
    from sftcore.train.method import LossMethod

# columns of the sums of a data set
_LOSS, _RIGHT, _TOKENS, _WHOLE, _EXAMPLES, _LEFT_OUT = range(6)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMetrics:
    """What the trained tokens of the evaluation rows came to.

    Attributes:
        metrics: By name, without `eval_`.
        num_examples: The rows that were seen, over all ranks.
        non_finite: The row numbers on this rank whose loss is NaN or infinite.
    """

    metrics: dict[str, float]
    num_examples: int
    non_finite: list[int]


class Evaluator:
    """What an evaluation does: the losses of all rows, and generated answers where they are asked for."""

    def __init__(
        self,
        config: TrainConfig,
        loader: BatchLoader,
        method: LossMethod,
        engine: Engine,
        device: torch.device,
        folder: Path,
    ) -> None:
        """Reads the rows that will be answered.

        Raises:
            ConfigError: Answers are asked for, and no row has a question.
        """
        self.config = config
        self.loader = loader
        self.method = method
        self.engine = engine
        self.device = device
        self.predictor = Predictor(config, loader, engine, folder) if config.generates else None

    def evaluate(
        self, model: Any, batches: Iterable[dict[str, Any]], step: int
    ) -> tuple[dict[str, float], int]:
        """Returns the metrics, by name without `eval_`, and the number of rows.

        Args:
            model: In evaluation mode.
            batches: Of this rank, on the device of the model.
            step: The optimizer steps so far.

        Raises:
            NonFiniteError: The loss of a row is NaN or infinite, and `--on_non_finite` is `raise`.
        """
        found = evaluate_tokens(
            batches,
            lambda batch: self.method.losses(model, batch)[0],
            self.loader,
            self.engine.reduce,
            device=self.device,
            shows_seq_acc=self.config.acc_strategy == "seq",
        )
        # every rank knows from the sums that it must not wait for those that raise
        if found.metrics.get("non_finite") and self.config.on_non_finite == "raise":
            places = self.engine.gather_objects(places_of(self.loader, found.non_finite))
            raise NonFiniteError(
                f"evaluation after step {step}: the loss of {len(places)} rows is not finite: {first(places)}; look at "
                "them, or pass --on_non_finite skip to leave such rows out"
            )
        metrics = found.metrics
        if self.predictor is not None:
            metrics = {**metrics, **self.predictor.answer(model, step)}
        return metrics, found.num_examples


def evaluate_tokens(
    batches: Iterable[dict[str, Any]],
    losses: Callable[[dict[str, Any]], TokenLosses],
    loader: BatchLoader,
    reduce: Callable[..., Tensor],
    *,
    device: torch.device,
    shows_seq_acc: bool,
) -> TokenMetrics:
    """Returns `loss`, `perplexity`, `token_acc`, and for several data sets `loss/NAME` of each.

    An example whose loss is not finite is left out of all of these, and counted as `non_finite`.

    Args:
        batches: Of this rank, with `rows`, on `device`.
        losses: From a batch to the losses of its trained tokens.
        loader: Where the rows come from.
        reduce: Adds a tensor over ranks, called with it and `"sum"`.
        device: Where sums are kept.
        shows_seq_acc: Adds `seq_acc`, the share of examples whose trained tokens are all right.
    """
    shown = shown_names(loader)
    names = list(shown)
    sums = torch.zeros(len(names), 6, dtype=torch.float64, device=device)
    num_examples = torch.zeros(1, dtype=torch.float64, device=device)
    numbers, finite = [], []
    with torch.no_grad():
        for batch in batches:
            plain = {name: value for name, value in batch.items() if name != "loss_weights"}
            of_examples = sums_by_example(plain, losses(plain)).to(device)
            loss, right, tokens = of_examples.unbind(dim=1)
            is_finite = torch.isfinite(loss)
            counted = is_finite & (tokens > 0)
            whole = (right == tokens) & counted
            columns = [loss.where(is_finite, 0.0), right * is_finite, tokens * is_finite]
            columns += [whole.double(), counted.double(), (~is_finite).double()]
            sums.index_add_(0, _sources(plain, loader, names, device), torch.stack(columns, dim=1))
            num_examples += len(loss)
            numbers.append(batch["rows"].to(device))
            finite.append(is_finite)
    total = reduce(torch.cat([sums.flatten(), num_examples]), "sum").tolist()
    by_set = [total[place : place + 6] for place in range(0, 6 * len(names), 6)]
    return TokenMetrics(
        metrics=_metrics(list(shown.values()), by_set, shows_seq_acc=shows_seq_acc),
        num_examples=int(total[-1]),
        non_finite=torch.cat(numbers)[~torch.cat(finite)].tolist() if numbers else [],
    )


def _sources(
    batch: dict[str, Any], loader: BatchLoader, names: list[str], device: torch.device
) -> Tensor:
    """Returns the number of the data set of each example, int64 `[examples]`."""
    rows = batch["rows"].tolist()
    if len(names) == 1:
        return torch.zeros(len(rows), dtype=torch.int64, device=device)
    numbers = [names.index(loader.source_of(row)) for row in rows]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _metrics(
    names: list[str], by_set: list[list[float]], *, shows_seq_acc: bool
) -> dict[str, float]:
    # in the order of the columns above
    loss, right, tokens, whole, examples, left_out = (
        sum(column) for column in zip(*by_set, strict=True)
    )
    metrics = {}
    if tokens:
        metrics = {"loss": loss / tokens, "token_acc": right / tokens}
        if shows_seq_acc:
            metrics["seq_acc"] = whole / examples
        # of a loss over 700 the perplexity is no number any more
        if loss / tokens < 700:
            metrics["perplexity"] = math.exp(loss / tokens)
    if len(names) > 1:
        for name, sums in zip(names, by_set, strict=True):
            if sums[2]:
                metrics[f"loss/{name}"] = sums[0] / sums[2]
    if left_out:
        metrics["non_finite"] = left_out
    return metrics
