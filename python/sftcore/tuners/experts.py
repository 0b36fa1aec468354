"""Experts that a model keeps in one parameter: which they are, and which tuners train them.

Transformers 5 holds the weights of all experts of a layer as one parameter of three dimensions, `[experts, ...]`, in a
module that is no linear layer. PEFT puts a LoRA on such a parameter, or on the weight of any other module, where the
configuration names it among its `target_parameters`; each expert has matrices of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import peft
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.models.shapes import full_shape

if TYPE_CHECKING:
    from torch import nn

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_ROUTER = re.compile(r"router", re.IGNORECASE)


def fused_experts(modules: dict[str, nn.Module]) -> list[str]:
    """Returns whole names of the parameters that hold weights of several experts, in the order of the model.

    Args:
        modules: All modules of a model by name.
    """
    return [
        f"{name}.{own}"
        for name, module in modules.items()
        if _EXPERTS.search(f"{type(module).__name__} {name}")
        for own, parameter in module.named_parameters(recurse=False)
        if len(full_shape(parameter)) == 3 and not own.endswith("bias")
    ]


def routers(modules: dict[str, nn.Module]) -> list[str]:
    """Returns whole names of the modules that choose experts and have a weight for it.

    A router is called so, in its class or its path, or is a gate beside experts.

    Args:
        modules: All modules of a model by name.
    """
    found = []
    for name, module in modules.items():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or len(full_shape(weight)) != 2:
            continue
        parent, _, own = name.rpartition(".")
        beside_experts = own == "gate" and f"{parent}.experts" in modules
        in_router = any(_ROUTER.fullmatch(part) for part in name.split("."))
        if beside_experts or in_router or _ROUTER.search(type(module).__name__):
            found.append(name)
    return found


def is_adaptable(parameter: Any) -> bool:
    """Whether an adapter can be added to a parameter: numbers in 4 or 8 bits are none to add to."""
    return bool(parameter.is_floating_point() and parameter.element_size() > 1)


def why_no_parameters(config: TrainConfig) -> str | None:
    """Returns why a tuner cannot train parameters that are not in a linear layer; None where it can."""
    if config.tuner_type != "lora":
        return f"--tuner_type {config.tuner_type} knows linear layers alone"
    if config.use_dora:
        return "--use_dora knows linear layers alone"
    if config.init_weights not in ("true", "false", "gaussian"):
        return f"--init_weights {config.init_weights} starts on linear layers alone"
    return None


def read_as_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Returns the linear layers that PEFT would take for experts of an older Transformers.

    In models whose experts were linear layers once (`gate_proj`, `up_proj`, `down_proj`; `w1` to `w3`), PEFT turns
    these names into those of the fused parameters wherever a LoRA has them among its modules, so that dense layers and
    shared experts, which have such names still, would be passed by. Among its parameters it takes them as they are.

    Args:
        model: A causal language model of Transformers.
        names: Whole names of linear layers.
    """
    kinds: dict[str, bool] = {}
    found = set()
    for name in names:
        kind = name.rsplit(".", 1)[-1]
        if kind not in kinds:
            kinds[kind] = _is_read_as_experts(model, kind)
        if kinds[kind]:
            found.add(name)
    return found


def _is_read_as_experts(model: Any, kind: str) -> bool:
    settings = peft.LoraConfig(target_modules=[kind])
    try:
        convert_peft_config_for_transformers(settings, model=model, conversions=None)
    except ValueError:
        return True  # it misses the other half of a fused parameter
    return kind not in (settings.target_modules or ())


def short_parameters(chosen: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Returns the ends of names, module and parameter, where these say the same, else the names themselves.

    Args:
        chosen: Whole names of parameters.
        parameters: Whole names of all parameters of the model.
    """
    chosen = list(chosen)
    ends = {".".join(name.split(".")[-2:]) for name in chosen}
    meant = [name for name in parameters if ".".join(name.split(".")[-2:]) in ends]
    return sorted(ends) if set(meant) == set(chosen) else chosen


def adapted_parameter(module: nn.Module) -> str | None:
    """Returns the name of the parameter that a LoRA is on, where it is not that of a linear layer of PEFT."""
    return module.parameter_name if isinstance(module, ParamWrapper) else None


def refuse_parameters(model: nn.Module, asked: str) -> None:
    """Raises a ConfigError where a model has an adapter on a parameter, with which an engine was not seen to work.

    Args:
        model: The model with its tuner.
        asked: The setting that asks for the engine.
    """
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ConfigError(
            f"{asked} cannot be used with an adapter on experts, or on other weights that PEFT takes for parameters; "
            "take --fsdp fsdp2 or --deepspeed zero3, or adapt attention alone (--target_modules q_proj k_proj v_proj "
            "o_proj)"
        )
