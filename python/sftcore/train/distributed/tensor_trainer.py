"""The Trainer of tensor parallelism: gradients are averaged over the groups that share the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sftcore.train.distributed.spread_trainer import SpreadTrainer


class TensorTrainer(SpreadTrainer):
    """A Trainer whose ranks average gradients with those that have the same parts."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:  # noqa: ARG002
        world = self.engine.world
        if not training or world.data_size == 1 or model is not self.model:
            return model
        # casts and compiles the model itself, which evaluation calls
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return DistributedDataParallel(
            model,
            device_ids=[world.local_rank] if torch.cuda.is_available() else None,
            process_group=self.engine.data_group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
