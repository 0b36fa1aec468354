"""A short run of a tuner, with the model as it was before the first step and after the last."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sftcore.config import TrainConfig
from sftcore.data import Encoder
from sftcore.train import run, train

IDS = torch.arange(100, 148)[None]


@dataclass
class Tuned:
    """A run that is over.

    Attributes:
        model: The model in memory.
        before: All its tensors before the first step.
        losses: The loss on one row, before and after.
        result: What `train` returned.
        said: What was said of the model before the first step.
    """

    model: Any
    before: dict[str, Tensor]
    losses: tuple[float, float]
    result: dict[str, Any]
    said: list[str]

    @property
    def checkpoint(self) -> Path:
        return Path(self.result["last_model_checkpoint"])

    def changed(self) -> set[str]:
        after = self.model.state_dict()
        assert after.keys() == self.before.keys()
        return {name for name, value in after.items() if not torch.equal(value, self.before[name])}

    def trained(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if p.requires_grad}


def tune(config: TrainConfig) -> Tuned:
    """Trains as `config` says."""
    held: dict[str, Any] = {}
    opened_by = run.open_model
    row = first_row(config.model, config.dataset[0])

    def open_model(*arguments: Any) -> Any:
        opened = opened_by(*arguments)
        held["opened"] = opened
        held["before"] = {name: t.clone() for name, t in opened.model.state_dict().items()}
        held["loss"] = loss_of(opened.model, row)
        return opened

    with patch.object(run, "open_model", open_model):
        result = train(config)
    model = held["opened"].model
    losses = (held["loss"], loss_of(model, row))
    return Tuned(model, held["before"], losses, result, held["opened"].lines)


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """The logits of a row of tokens, without dropout."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    model.train(mode)
    return logits


def loss_of(model: Any, ids: Tensor) -> float:
    """The loss on a row of tokens, without dropout."""
    logits = logits_of(model, ids)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


@functools.lru_cache
def first_row(model: str, rows: str) -> Tensor:
    """The tokens of the first of the rows."""
    line = Path(rows).read_text(encoding="utf-8").partition("\n")[0]
    return torch.from_numpy(Encoder.from_pretrained(model).encode(line).input_ids)[None].long()
