"""The parameters of a model in groups of like treatment.

In comes a model, out go groups for an optimizer: each trained parameter stands in one of them, with its weight decay,
learning rate and kind of update. Groups at the plain learning rate come first, so that a logged rate is that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.models.shapes import full_shape
from sftcore.tuners import learning_rate_factors, undecayed_parameters


def parameter_groups(
    model: nn.Module,
    config: TrainConfig,
    *,
    decayed: AbstractSet[str],
    projection: dict[str, Any] | None = None,
    has_muon: bool = False,
) -> tuple[list[dict[str, Any]], str]:
    """Returns the groups of the trained parameters.

    No vector is decayed, be it a norm, a bias or a gate, nor what `decayed` leaves out: decay keeps matrices small,
    while a norm at 0 would switch its layer off.

    Args:
        model: The model with its tuner.
        config: The settings of the run.
        decayed: The names of parameters that weight decay is for, by Transformers' rule.
        projection: What the groups of projected gradients have more; None or empty projects none.
        has_muon: Whether hidden matrices are updated by Muon.

    Returns:
        The groups, and a line that counts them.

    Raises:
        ConfigError: No layer has a gradient to project.
    """
    factors, undecayed = learning_rate_factors(model, config), undecayed_parameters(model)
    projected = _projected(model, config) if projection else set()
    hidden = _hidden_matrices(model) if has_muon else set()
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = name in decayed and name not in undecayed and _dimensions(parameter) > 1
        special = name in projected or name in hidden
        groups.setdefault((factors.get(name, 1.0), special, is_decayed), []).append(parameter)
        counts["decayed" if is_decayed else "not decayed"] += 1
        counts["special"] += special
    kept = []
    for (factor, special, is_decayed), parameters in sorted(
        groups.items(), key=lambda item: (item[0][0] != 1, *item[0])
    ):
        group: dict[str, Any] = {
            "params": parameters,
            "lr": config.effective_learning_rate * factor,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        if has_muon:
            group["muon"] = special
        if special and projection:
            group |= projection
        kept.append(group)
    return kept, _describe(config, counts, factors, projection, has_muon=has_muon)


def _describe(
    config: TrainConfig,
    counts: Counter[str],
    factors: dict[str, float],
    projection: dict[str, Any] | None,
    *,
    has_muon: bool,
) -> str:
    parts = [
        f"{counts['decayed']:,} matrices with weight decay {config.weight_decay:g}, "
        f"{counts['not decayed']:,} parameters without"
    ]
    if has_muon:
        parts.append(f"{counts['special']:,} by Muon, the others by AdamW")
    if projection:
        parts.append(f"{counts['special']:,} with gradients projected to rank {projection['rank']}")
    for factor, number in sorted(Counter(factors.values()).items()):
        if factor != 1:
            parts.append(f"{number:,} at {factor:g} times the learning rate")
    return "; ".join(parts)


def _dimensions(parameter: nn.Parameter) -> int:
    return len(full_shape(parameter))


def _projected(model: nn.Module, config: TrainConfig) -> set[str]:
    wanted = config.optim_target_modules
    head = _head(model)
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and (
            any(part in name or re.fullmatch(part, name) for part in wanted)
            if wanted and wanted != ["all-linear"]
            else module is not head
        )
    }
    if not names:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad
        }
        raise ConfigError(
            f"--optim_target_modules {' '.join(wanted)} is no trained linear layer of this model; expected all-linear "
            f"or some of {', '.join(sorted(linear))}"
        )
    return names


def _hidden_matrices(model: nn.Module) -> set[str]:
    """Returns the names of matrices between the embedding and the head."""
    head = _head(model)
    outer = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    ]
    return {
        name
        for name, parameter in model.named_parameters()
        if _dimensions(parameter) == 2
        and not any(name.startswith(f"{prefix}.") for prefix in outer)
        and "lora_embedding" not in name
    }


def _head(model: Any) -> nn.Module | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: nn.Module | None = base.get_output_embeddings()
    return head
