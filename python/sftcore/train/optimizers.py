"""The optimizer of a run, by name.

In come the settings and a model, out goes an optimizer of Transformers, torch or an optional package, whose
parameter groups differ in weight decay, learning rate and kind of update. A name, an argument or a package that is
wrong or missing is an error before anything is loaded; a setting that the optimizer would not take is one too.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from sftcore.config import TrainConfig
from sftcore.config.optimization import OptimizationConfig
from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError
from sftcore.train.averages import UseAverage
from sftcore.train.muon import MuonAndAdamW, muon_arguments
from sftcore.train.parameters import parameter_groups

# name or its beginning: the package, and what pip calls it
_PACKAGES = {
    # both import bitsandbytes for their 8-bit kinds, whichever kind is asked for
    "galore_": ("galore_torch", "galore-torch bitsandbytes"),
    "apollo_": ("apollo_torch", "apollo-torch bitsandbytes"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb"),
        ("bitsandbytes", "bitsandbytes"),
    ),
}
_INSIDE_BACKWARD = (
    "it updates weights inside the backward pass, where neither accumulated micro-batches nor clipping nor an exact "
    "resume hold; galore_adamw and apollo_adamw need little memory too"
)
# what torch.optim has besides optimizers that take a plain step on dense gradients
_UNFIT = {
    "lbfgs": "it evaluates the loss several times a step",
    "sparseadam": "it takes sparse gradients alone",
}
_PROJECTED = {
    "galore_adamw": ("galore_torch", "GaLoreAdamW"),
    "galore_adamw_8bit": ("galore_torch", "GaLoreAdamW8bit"),
    "galore_adafactor": ("galore_torch", "GaLoreAdafactor"),
    "apollo_adamw": ("apollo_torch", "APOLLOAdamW"),
}
_PROJECTIONS = {
    "galore_torch": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo_torch": {
        "rank": 128,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    },
}
# the classes whose objects stand in the optimizer's state
_PROJECTORS = {
    "galore_torch": [("galore_projector", "GaLoreProjector")],
    "apollo_torch": [
        ("svd_projector", "GaLoreProjector"),
        ("random_projector", "GradientProjector"),
    ],
}
# what a setting of its own says
_OWN_SETTINGS = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An optimizer that is not yet made.

    Attributes:
        name: What it is called.
        make: Makes it of parameter groups and `arguments`.
        arguments: Its arguments besides the groups.
        projection: For GaLore and APOLLO: what the groups of projected gradients have more.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    arguments: dict[str, Any]
    projection: dict[str, Any] = field(default_factory=dict)


def choose_optimizer(
    config: TrainConfig, device: torch.device | str | None = None, warmup_steps: int = 0
) -> Choice:
    """Returns the optimizer that `config` names.

    Args:
        config: The settings of the run.
        device: Where the weights are; a GPU where there is one, if not given.
        warmup_steps: The steps of warm-up, which schedule-free optimizers do themselves.

    Raises:
        ConfigError: The name or an argument is unknown, its package is missing, or a setting has no effect with it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = config.optim
    if name == "auto":
        name = "adamw_torch_fused" if has_fused(device) else "adamw_torch"
    names = {str(each.value) for each in OptimizerNames}
    projection: dict[str, Any] = {}
    make: Any
    if name == "muon":
        make, arguments = MuonAndAdamW, muon_arguments(config, fused=has_fused(device))
    elif name in names:
        _check_package(name)
        if name in _PROJECTED:
            make, arguments, projection = _projected(config, name, device)
        else:
            make, arguments = _of_transformers(config, name, warmup_steps)
        if name == "stable_adamw" and torch.device(device).type == "cpu":
            # it takes Triton's kernel wherever Triton is installed, also where there is no GPU for it
            arguments["triton"] = False
        if arguments.get("fused") and not has_fused(device):
            raise ConfigError(
                f"--optim {name} does not run on {torch.device(device).type}; expected --optim adamw_torch"
            )
    else:
        make = _of_torch(name, names)
        arguments = {"lr": config.effective_learning_rate}
        taken = inspect.signature(make).parameters
        if "betas" in taken:
            arguments["betas"] = (config.adam_beta1, config.adam_beta2)
        if "eps" in taken and name.rsplit(".", 1)[-1].lower() != "adafactor":
            arguments["eps"] = config.adam_epsilon
    _add_arguments(config, name, make, arguments, projection)
    _check_effects(config, name, arguments)
    return Choice(name=name, make=make, arguments=arguments, projection=projection)


def make_optimizer(
    trainer: Trainer, model: nn.Module, config: TrainConfig
) -> tuple[torch.optim.Optimizer, str]:
    """Makes the optimizer of a trainer.

    Args:
        trainer: Its arguments have the steps of warm-up.
        model: The model with its tuner.
        config: The settings of the run.

    Returns:
        The optimizer, and a line that says what it does.
    """
    device = next(model.parameters()).device
    choice = choose_optimizer(config, device, int(trainer.args.warmup_steps))
    groups, counts = parameter_groups(
        model,
        config,
        decayed=set(trainer.get_decay_parameter_names(model)),
        projection=choice.projection,
        has_muon=choice.name == "muon",
    )
    if choice.projection:
        _trust_projectors(_PROJECTED[choice.name][0])
    if choice.arguments.get("optim_bits") == 8:
        _keep_embeddings_whole(model)
    optimizer = choice.make(groups, **choice.arguments)
    if hasattr(optimizer, "eval"):
        trainer.add_callback(UseAverage())
    return optimizer, f"optimizer: {choice.name}; {counts}"


def optimizer_name(config: TrainConfig) -> str:
    """Returns the name that `TrainingArguments` knows for the optimizer, or that of AdamW where it knows none."""
    name = choose_optimizer(config).name
    return name if name in {str(each.value) for each in OptimizerNames} else "adamw_torch"


def has_fused(device: torch.device | str) -> bool:
    """Whether a device has AdamW as one kernel."""
    try:
        torch.optim.AdamW([torch.zeros(1, device=device)], fused=True)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _check_package(name: str) -> None:
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        raise ConfigError(f"--optim {name} is not supported, as {_INSIDE_BACKWARD}")
    for beginning, (package, pip) in _PACKAGES.items():
        if name == beginning or (name.startswith(beginning) and name not in _PACKAGES):
            for needed in (package, *pip.split()[1:]):
                if importlib.util.find_spec(needed) is None:
                    raise ConfigError(
                        f"--optim {name} needs the package {needed}, which is not installed; run pip install {pip}"
                    )


def _of_transformers(
    config: TrainConfig, name: str, warmup_steps: int
) -> tuple[Any, dict[str, Any]]:
    arguments = SimpleNamespace(
        optim=OptimizerNames(name),
        optim_args=None,
        learning_rate=config.effective_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        warmup_steps=warmup_steps,
    )
    try:
        make, taken = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--optim {name} does not run here: {error}") from error
    return make, dict(taken)


def _of_torch(name: str, others: set[str]) -> Any:
    classes = {
        each.lower(): kind
        for each, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    for unfit in ("optimizer", "muon"):
        classes.pop(unfit, None)
    asked = name.removeprefix("torch.optim.").lower()
    if asked in _UNFIT:
        raise ConfigError(f"--optim {name} cannot train a language model, as {_UNFIT[asked]}")
    if asked not in classes:
        known = {"auto", "muon", *others, *set(classes) - set(_UNFIT)}
        raise ConfigError(
            f"--optim {name} is unknown; expected auto, a name of Transformers (adamw_torch, adafactor, ...), one of "
            f"torch.optim ({', '.join(sorted(set(classes) - set(_UNFIT)))}), or muon{did_you_mean(name, known)}"
        )
    return classes[asked]


def _projected(
    config: TrainConfig, name: str, device: torch.device | str
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    if name == "galore_adamw_8bit" and torch.device(device).type == "cpu":
        raise ConfigError(f"--optim {name} does not run here: it needs a GPU")
    if not config.trains_weights:
        raise ConfigError(
            f"--optim {name} has no effect with --tuner_type {config.tuner_type}: the gradients of an adapter are "
            "small already; expected --tuner_type full or freeze"
        )
    package, kind = _PROJECTED[name]
    make: Any = getattr(importlib.import_module(package), kind)
    arguments: dict[str, Any] = {"lr": config.effective_learning_rate}
    if name == "galore_adafactor":
        arguments |= {"scale_parameter": False, "relative_step": False}
    else:
        arguments |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if name == "galore_adamw":
        arguments["no_deprecation_warning"] = True
    return make, arguments, dict(_PROJECTIONS[package])


def _add_arguments(
    config: TrainConfig,
    name: str,
    make: Any,
    arguments: dict[str, Any],
    projection: dict[str, Any],
) -> None:
    """Puts `--optim_args` where they belong."""
    taken = set(inspect.signature(make).parameters) - {"self", "params", "model", "args"}
    for key, value in config.optimizer_arguments.items():
        if key in _OWN_SETTINGS:
            raise ConfigError(f"--optim_args {key} is what {_OWN_SETTINGS[key]} says; use that")
        if key in projection:
            projection[key] = value
        elif key in ("beta1", "beta2", "beta3") and "betas" in arguments:
            betas = [*arguments["betas"]]
            place = int(key[-1]) - 1
            if place >= len(betas):
                raise ConfigError(f"--optim_args {key} is unknown: {name} has {len(betas)} betas")
            betas[place] = value
            arguments["betas"] = tuple(betas)
        elif key in taken or key in arguments:
            arguments[key] = tuple(value) if isinstance(value, list) else value
        else:
            known = (taken | set(projection)) - set(_OWN_SETTINGS)
            raise ConfigError(
                f"--optim_args {key} is unknown to {name}; expected some of {', '.join(sorted(known))}"
                f"{did_you_mean(key, known)}"
            )


def _check_effects(config: TrainConfig, name: str, arguments: dict[str, Any]) -> None:
    for setting, argument in {
        "adam_beta1": "betas",
        "adam_beta2": "betas",
        "adam_epsilon": "eps",
    }.items():
        default = OptimizationConfig.__dataclass_fields__[setting].default
        if argument not in arguments and getattr(config, setting) != default:
            raise ConfigError(f"--{setting} has no effect with --optim {name}")


def _trust_projectors(package: str) -> None:
    """Lets torch read back the projections in an optimizer's state, as it reads nothing but tensors by itself."""
    for module, kind in _PROJECTORS[package]:
        torch.serialization.add_safe_globals(
            [getattr(importlib.import_module(f"{package}.{module}"), kind)]
        )


def _keep_embeddings_whole(model: nn.Module) -> None:
    """Keeps the state of embeddings in 32 bits, as bitsandbytes advises (Dettmers et al. 2022, arXiv:2110.02861)."""
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
