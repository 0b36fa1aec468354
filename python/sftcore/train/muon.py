"""Muon for hidden matrices, AdamW for all else, as one optimizer with one state.

In come parameter groups, each of which says which of both updates it; learning rates are those of AdamW, as the
updates of Muon are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError


def muon_arguments(config: TrainConfig, *, fused: bool) -> dict[str, Any]:
    """Returns the arguments of `MuonAndAdamW` besides its groups.

    Raises:
        ConfigError: The installed torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"--optim muon needs torch 2.9 or later, but {torch.__version__} is installed; run pip install -U torch"
        )
    return {
        "lr": config.effective_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "fused": fused,
    }


class MuonAndAdamW(torch.optim.Optimizer):
    """Updates groups whose `muon` is true by Muon (Jordan et al. 2024), the others by AdamW.

    Args:
        groups: Parameter groups with `params`, `lr`, `weight_decay` and `muon`.
        lr: The learning rate of groups that have none of their own.
        betas: Of AdamW.
        eps: Of AdamW.
        fused: Whether AdamW runs as one kernel.
        momentum: Of Muon.
        nesterov: Whether the momentum of Muon looks ahead.
        ns_steps: Newton-Schulz iterations that make an update orthogonal.
        adjust_lr_fn: How updates are scaled by the shape of a matrix: `match_rms_adamw`, or `original`, which wants
            learning rates of its own.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        super().__init__(groups, {"lr": lr})
        by_muon, by_adamw = self._split()
        # each takes the very groups and the very state of this optimizer, so schedulers and checkpoints see one
        self._parts: list[torch.optim.Optimizer] = []
        if by_muon:
            muon = torch.optim.Muon(
                by_muon,
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
            self._parts.append(muon)
        if by_adamw:
            self._parts.append(
                torch.optim.AdamW(by_adamw, lr=lr, betas=betas, eps=eps, fused=fused)
            )
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates all groups."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint."""
        super().load_state_dict(state_dict)
        self._share()

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = self.param_groups
        return [group for group in groups if group["muon"]], [
            group for group in groups if not group["muon"]
        ]

    def _share(self) -> None:
        for part, groups in zip(
            self._parts, [groups for groups in self._split() if groups], strict=True
        ):
            part.state, part.param_groups = self.state, groups
