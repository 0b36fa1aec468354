"""What the trained tokens of a run say beyond their mean loss, counted between two logs.

Sums stay on the device until they are logged, and are added over ranks, so that each number is exact: a mean over
tokens, never a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sftcore.data import BatchLoader, StreamLoader
from sftcore.train.data_sets import shown_names
from sftcore.train.inputs import examples_of_tokens
from sftcore.train.loss import TokenLosses


class Tally:
    """Losses and right tokens, by data set."""

    def __init__(self, loader: BatchLoader | StreamLoader) -> None:
        # a stream does not say which data set a row is of
        self.loader = loader if isinstance(loader, BatchLoader) else None
        shown = shown_names(self.loader) if self.loader else {}
        self.names, self.shown = list(shown), list(shown.values())
        self.sums: Tensor | None = None  # [data sets, (loss, right, tokens)]

    def add(self, batch: dict[str, Any], losses: TokenLosses) -> None:
        """Counts a batch.

        Args:
            batch: As the loader gave it, with `rows`.
            losses: Of its trained tokens.
        """
        device = losses.losses.device
        if self.sums is None:
            self.sums = torch.zeros(max(1, len(self.names)), 3, dtype=torch.float64, device=device)
        # a token whose loss is not finite is named elsewhere, and would hide all others here
        is_finite = torch.isfinite(losses.losses)
        loss = losses.losses.where(is_finite, 0.0)
        right = losses.right & is_finite
        values = torch.stack([loss, right.float(), is_finite.float()], dim=1).double()
        self.sums.index_add_(0, self._sources(batch, device), values)

    def take(self, reduce: Callable[..., Any]) -> dict[str, float]:
        """Returns `token_acc` and, for several data sets, `loss/NAME` of each, and begins anew.

        Args:
            reduce: Adds a tensor over ranks, called with it and `"sum"`.
        """
        if self.sums is None:
            return {}
        sums = reduce(self.sums, "sum").tolist()
        self.sums = None
        tokens = sum(part[2] for part in sums)
        if not tokens:
            return {}
        found = {"token_acc": sum(part[1] for part in sums) / tokens}
        if len(self.names) > 1:
            found |= {
                f"loss/{name}": part[0] / part[2]
                for name, part in zip(self.shown, sums, strict=True)
                if part[2]
            }
        return found

    def _sources(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """Returns the number of the data set of each trained token."""
        examples = examples_of_tokens(batch)
        if self.loader is None or len(self.names) < 2:
            return torch.zeros_like(examples)
        numbers = [self.names.index(self.loader.source_of(row)) for row in batch["rows"].tolist()]
        return torch.tensor(numbers or [0], device=device)[examples]
