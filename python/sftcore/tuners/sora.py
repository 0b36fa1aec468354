"""SoRA: a LoRA whose ranks have gates, and gates at 0 are ranks that need not be (Ding et al. 2023, arXiv:2311.11696).

Each rank of each module has a gate that multiplies it. After each optimizer step every gate moves towards 0 by its
learning rate times lambda and stays there where it arrives: the proximal step of an L1 penalty. A saved adapter has the
gates folded into B and the ranks at 0 left out, so that it is a plain LoRA with a rank for each module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.tuners.exact import ADAPTER, ExactModel

_GATE = "parametrizations.weight.0.gate"
_ORIGINAL = "parametrizations.weight.original"
_PREFIX = "base_model.model."


class Gate(nn.Module):
    """Multiplies each column of B, which is each rank of a LoRA, by its gate."""

    def __init__(self, rank: int, device: torch.device) -> None:
        super().__init__()
        # as in the code of the paper; the spread of starts decides which of equal ranks goes first
        self.gate = nn.Parameter(torch.randn(rank).to(device))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns B, `[out_features, rank]`, with its gates."""
        return weight * self.gate.to(weight.dtype)


class SoraModel(ExactModel):
    """A LoRA with a gate on each rank."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = ADAPTER) -> None:
        super().__init__(model, peft_config, adapter_name)
        for _, layer in self.gated_layers():
            matrix = layer.lora_B[ADAPTER]
            gate = Gate(layer.r[ADAPTER], matrix.weight.device)
            parametrize.register_parametrization(matrix, "weight", gate)

    def gated_layers(self) -> Iterator[tuple[str, Any]]:
        """Yields each LoRA layer by the name it has in the model without adapters."""
        for name, module in self.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def gates(self) -> dict[str, nn.Parameter]:
        """Returns each vector of gates by the name of its parameter."""
        return {name: p for name, p in self.named_parameters() if name.endswith(_GATE)}

    def converted(self, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Returns a plain LoRA: gates folded into B, ranks whose gate is 0 left out."""
        config = copy.deepcopy(self.peft_config[ADAPTER])
        plain = dict(state)
        ranks: dict[str, int] = {}
        layers = dict(self.gated_layers())
        alive = [name for name in layers if state[_gate_of(name)].count_nonzero()]
        for name, layer in layers.items():
            down, up = (f"{_PREFIX}{name}.lora_{matrix}.{ADAPTER}" for matrix in "AB")
            gate, matrix_a = plain.pop(_gate_of(name)), plain.pop(f"{down}.weight")
            matrix_b = plain.pop(f"{up}.{_ORIGINAL}")
            # an adapter has at least one module with one rank, even where all are pruned
            kept = gate != 0 if alive or ranks else torch.arange(len(gate), device=gate.device) == 0
            if not kept.any():
                continue
            ranks[name] = int(kept.sum())
            plain[f"{down}.weight"] = matrix_a[kept]
            plain[f"{up}.weight"] = (matrix_b * gate.to(matrix_b.dtype))[:, kept]
            scaling = layer.scaling[ADAPTER]
            alpha = scaling * (ranks[name] ** 0.5 if config.use_rslora else ranks[name])
            if ranks[name] != config.r:
                config.rank_pattern[name] = ranks[name]
                config.alpha_pattern[name] = alpha
        if len(ranks) < len(layers):
            config.target_modules = set(ranks)
        return config, plain

    def numbers(self) -> dict[str, float]:
        """Returns the mean rank of a module and the share of gates at 0."""
        gates = list(self.gates().values())
        counts = [(gate != 0).sum() for gate in gates]
        # gates that are spread over ranks are counted on all of them
        alive = sum(int(n.full_tensor() if isinstance(n, DTensor) else n) for n in counts)
        total = sum(len(gate) for gate in gates)
        return {"sora_mean_rank": alive / len(gates), "sora_zero_gates": 1 - alive / total}


def _gate_of(name: str) -> str:
    return f"{_PREFIX}{name}.lora_B.{ADAPTER}.{_GATE}"


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """Moves values towards 0 by a threshold, and to 0 where they are nearer to it."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


class ShrinkGates(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """The proximal step of the L1 penalty, after each optimizer step."""

    def __init__(self, model: SoraModel, sparsity: float) -> None:
        self.gates = list(model.gates().values())
        self.sparsity = sparsity

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Shrinks every gate by the learning rate that its step had, times lambda."""
        if all(gate.grad is None for gate in self.gates):
            return  # the step was left out
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for gate in self.gates:
                gate.copy_(soft_threshold(gate, rates[id(gate)] * self.sparsity))
