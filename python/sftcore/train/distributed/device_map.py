"""`--device_map`: the layers of a model lie on several GPUs of one process, which take turns.

Transformers places the layers while it loads them, and accelerate's hooks carry the hidden states from one GPU to the
next. Batches go to the first GPU, and the loss comes back to it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError, SftcoreError
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.world import World
from sftcore.tuners.experts import refuse_parameters

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer


class DeviceMapEngine(Engine):
    """One process, several GPUs."""

    name = "device_map"

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self._layers: Counter[str] = Counter()
        if world.size > 1:
            raise ConfigError(
                f"--device_map {config.device_map} spreads a model over the GPUs of one process, and there are "
                f"{world.size}; start one (leave out NPROC_PER_NODE), or take --fsdp or --tensor_parallel_size"
            )

    @property
    def spreads(self) -> bool:
        """Whether there are GPUs to spread a model over."""
        return torch.cuda.device_count() > 1

    def check_new_tokens(self) -> None:
        """Refuses an embedding that would be made longer after its place was given."""
        raise ConfigError(
            "--new_special_tokens cannot be used with --device_map, which places the weights before the embedding is "
            "made longer; leave out one of both, or take --fsdp"
        )

    def load_arguments(self) -> dict[str, Any]:
        """The map, where there are several GPUs."""
        return {"device_map": self.config.device_map} if self.spreads else {}

    def place(self, model: Any) -> Any:
        """Leaves each layer where it is.

        Raises:
            ConfigError: The GPUs are too small.
        """
        if not self.spreads:
            return super().place(model)
        places = {name: str(device) for name, device in model.hf_device_map.items()}
        off = [name for name, device in places.items() if device in ("cpu", "disk", "meta")]
        if off:
            raise ConfigError(
                f"--device_map {self.config.device_map}: {len(off)} parts of the model ({off[0]}, ...) do not fit on "
                f"the {torch.cuda.device_count()} GPUs; take more of them, --quant_bits 4, or --fsdp on several "
                "processes"
            )
        self._layers = Counter(places.values())
        return model

    def describe(self) -> str:
        """A line on which GPU has how many parts, or a warning where there is nothing to spread over."""
        if not self.spreads:
            there = "one GPU" if torch.cuda.is_available() else "no GPU"
            return (
                f"warning: --device_map {self.config.device_map} has no effect, as there is {there}; the model is on "
                "one device"
            )
        shown = ", ".join(
            f"{number} on GPU {device}" for device, number in sorted(self._layers.items())
        )
        return f"1 process: device_map {self.config.device_map}; parts of the model: {shown}"

    def check(self, trainer: SftTrainer) -> None:
        """Holds what runs to what was asked for: several GPUs have parts of the model.

        Raises:
            SftcoreError: One has all of it.
        """
        super().check(trainer)
        if not self.spreads:
            return
        refuse_parameters(trainer.model, f"--device_map {self.config.device_map}")
        used = {parameter.device for parameter in trainer.model.parameters()}
        if len(used) < 2 and self.config.device_map not in ("auto", "sequential"):
            raise SftcoreError(f"asked for {self.name}, but all of the model is on {used.pop()}")
