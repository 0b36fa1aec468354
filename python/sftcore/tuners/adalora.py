"""AdaLoRA: ranks go from modules that need them less to those that need them more (Zhang et al. 2023).

PEFT holds the update of each weight as singular vectors and values and sets the least important values to 0. What it
leaves to others is here: when this happens, the loss that keeps the vectors orthogonal, and a state to go on from.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.errors import ConfigError
from sftcore.tuners.exact import ADAPTER, ExactModel

_PREFIX = "base_model.model."
_MEANS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraModel(ExactModel):
    """An AdaLoRA whose orthogonality is a term of the trainer's loss."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = ADAPTER) -> None:
        super().__init__(model, peft_config, adapter_name)
        # PEFT would add the term to whatever the model calls its loss, be it a sum or a mean
        self.base_model.forward = lambda *args, **kwargs: self.base_model.model(*args, **kwargs)

    def matrices(self, letter: str) -> dict[str, Tensor]:
        """Returns the matrices A, B, or the singular values E, of all modules by name."""
        part = f".lora_{letter}.{ADAPTER}"
        return {name: p for name, p in self.named_parameters() if name.endswith(part)}

    def regularization(self) -> Tensor:
        """Returns the mean distance of singular vectors from orthogonality, times its weight."""
        products = [a @ a.T for a in self.matrices("A").values()]
        products += [b.T @ b for b in self.matrices("B").values()]
        distances = [
            torch.linalg.matrix_norm(product - torch.eye(len(product)).to(product))
            for product in products
        ]
        weight: float = self.peft_config[ADAPTER].orth_reg_weight
        return torch.stack(distances).mean() * weight

    def converted(self, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Returns the ranks that are in use or do something; PEFT leaves out the others when it saves."""
        config = copy.deepcopy(self.peft_config[ADAPTER])
        for name, used in (config.rank_pattern or {}).items():
            # between two allocations a rank may come back
            config.rank_pattern[name] = [
                is_used or bool(value)
                for is_used, value in zip(used, state[_PREFIX + name].flatten(), strict=True)
            ]
        return config, dict(state)

    def more_state(self) -> dict[str, Tensor]:
        """Returns the means that importance is told from, and which ranks are in use."""
        allocator = self.base_model.rankallocator
        state = {
            f"{mean}:{name}": value
            for mean in _MEANS
            for name, value in getattr(allocator, mean).items()
        }
        pattern = self.peft_config[ADAPTER].rank_pattern or {}
        return state | {f"ranks:{name}": torch.tensor(ranks) for name, ranks in pattern.items()}

    def load_more_state(self, state: dict[str, Tensor]) -> None:
        """Takes back the means and the ranks."""
        allocator = self.base_model.rankallocator
        places = {name: p.device for name, p in self.base_model.model.named_parameters()}
        for mean in _MEANS:
            found = {name: value for name, value in state.items() if name.startswith(f"{mean}:")}
            parts = {name.partition(":")[2]: value for name, value in found.items()}
            setattr(
                allocator, mean, {name: value.to(places[name]) for name, value in parts.items()}
            )
        ranks = {
            name.partition(":")[2]: value.tolist()
            for name, value in state.items()
            if name.startswith("ranks:")
        }
        self.peft_config[ADAPTER].rank_pattern = ranks or None

    def numbers(self) -> dict[str, float]:
        """Returns the mean rank of a module, and the loss of orthogonality, which no other loss contains."""
        settings = self.peft_config[ADAPTER]
        used = [sum(ranks) for ranks in (settings.rank_pattern or {}).values()]
        with torch.no_grad():
            loss = float(self.regularization())
        return {
            "adalora_mean_rank": sum(used) / len(used) if used else float(settings.init_r),
            "adalora_orth_loss": loss,
        }


class AllocateRanks(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Moves ranks between modules after each optimizer step, while its gradients are there."""

    def __init__(self, model: AdaLoraModel, total_steps: int) -> None:
        settings = model.peft_config[ADAPTER]
        if settings.tinit + settings.tfinal >= total_steps:
            raise ConfigError(
                f"--adalora_tinit {settings.tinit} and --adalora_tfinal {settings.tfinal} leave none of the "
                f"{total_steps} steps of this run to lower ranks in; take smaller ones"
            )
        before = total_steps - settings.tfinal
        if before < 2:
            raise ConfigError(
                f"--tuner_type adalora tells from one step which ranks to lower in the next, but {before} of the "
                f"{total_steps} steps of this run come before --adalora_tfinal {settings.tfinal}; expected 2 or more"
            )
        model.base_model.rankallocator.set_total_step(total_steps)
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Allocates ranks for the step that was just taken, which the state does not count yet."""
        step = state.global_step + 1
        settings = self.model.peft_config[ADAPTER]
        is_left_out = all(p.grad is None for p in self.model.matrices("E").values())
        end = settings.total_step - settings.tfinal
        if is_left_out and step < end:
            return  # importance is told from gradients, and a step that is left out has none
        importance = self.model.base_model.rankallocator.exp_avg_ipt
        if step >= end and not (settings.rank_pattern or importance):
            return  # all steps were left out, so that nothing tells the ranks apart
        self.model.base_model.update_and_allocate(step)
