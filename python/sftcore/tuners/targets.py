"""The names that a user gives for modules, to modules of the very model.

`--target_modules`, `--exclude_modules` and `--modules_to_save` name modules by their last part, by more of their path,
or by group (all-linear, DEFAULT, EMBEDDING, LN). A name that fits nothing is an error that lists what there is. A
weight that the embedding and the head share is trained in both places or in none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from sftcore.config import TrainConfig
from sftcore.config.tuner import ALL_LINEAR
from sftcore.errors import ConfigError

LINEAR = (nn.Linear, Conv1D)
_EMBEDDING = ("EMBEDDING", "all-embedding")
_NORMS = ("LN", "all-norm")
_DEFAULT = ("DEFAULT", "AUTO")


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The modules of a model that are trained.

    Attributes:
        adapted: Whole names of modules that get an adapter, in the order of the model.
        saved: Whole names of modules trained whole, beside it.
        ties_embedding: Whether the embedding is among them and shares its weight with the head.
        ties_lora: Whether it is so and gets an adapter.
    """

    adapted: tuple[str, ...]
    saved: tuple[str, ...]
    ties_embedding: bool
    ties_lora: bool


def find_targets(model: Any, config: TrainConfig) -> Targets:
    """Returns the modules that `config` names.

    Args:
        model: A causal language model of Transformers, without an adapter.
        config: The settings of the run.

    Raises:
        ConfigError: A name fits no module, a module cannot be trained this way, or none is left.
    """
    modules = dict(model.named_modules())
    head = _name_of(modules, model.get_output_embeddings())
    embedding = _name_of(modules, model.get_input_embeddings())
    is_tied = head is not None and modules[head].weight is modules[str(embedding)].weight
    linear = [name for name, child in modules.items() if isinstance(child, LINEAR)]
    norms = [name for name, child in modules.items() if is_norm(child)]
    adapted: set[str] = set()
    saved: set[str] = set()
    if config.target_regex:
        pattern = re.compile(config.target_regex)
        adapted.update(name for name in modules if pattern.fullmatch(name))
        adapted = {name for name in adapted if isinstance(modules[name], (*LINEAR, nn.Embedding))}
        if not adapted:
            raise ConfigError(
                f"--target_regex {config.target_regex} matches no linear layer or embedding; whole names are like "
                f"{linear[0]}"
            )
    else:
        for name in config.target_modules:
            if name in _NORMS:
                saved.update(norms)
            elif name in ALL_LINEAR:
                adapted.update(found for found in linear if found != head)
            else:
                adapted.update(_one(model, name, modules, linear))
    for name in config.modules_to_save:
        if name in _NORMS:
            saved.update(norms)
        elif name in _EMBEDDING:
            saved.add(str(embedding))
        else:
            saved.update(_named("modules_to_save", name, modules, list(modules)))
    for name in config.exclude_modules:
        found = _named("exclude_modules", name, modules, list(modules))
        excluded = {other for other in adapted if _is_in(other, found)}
        if not excluded:
            raise ConfigError(
                f"--exclude_modules {name} has no effect: nothing in it would get an adapter"
            )
        adapted -= excluded
    if config.layers_to_transform:
        adapted = _in_layers(adapted, config.layers_to_transform)
    adapted = {name for name in adapted if not _is_in(name, saved)}
    if not adapted:
        raise ConfigError(
            "--target_modules leaves no module to put an adapter on; leave out --exclude_modules or "
            "--layers_to_transform, or name other modules"
        )
    if is_tied and head in adapted | saved:
        raise ConfigError(
            f"{head} shares its weight with {embedding} in this model, so that neither is trained alone; name "
            "EMBEDDING in its place"
        )
    if is_tied and embedding in adapted and config.use_dora:
        raise ConfigError(
            f"--use_dora cannot be used on {embedding}, which shares its weight with {head}: the two would have a "
            "norm each; leave out one of them"
        )
    _check_embedding(config, modules, adapted)
    return Targets(
        adapted=tuple(name for name in modules if name in adapted),
        saved=tuple(name for name in modules if name in saved),
        ties_embedding=is_tied and embedding in adapted | saved,
        ties_lora=is_tied and embedding in adapted,
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with weights of its own."""
    return bool(re.search(r"norm", type(module).__name__, re.IGNORECASE)) and any(
        True for _ in module.parameters(recurse=False)
    )


def short_names(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Returns the last parts of names where these say the same, else the names themselves.

    Args:
        chosen: Whole names of modules.
        modules: Whole names of all modules of the model.
    """
    chosen = list(chosen)
    last = {name.rsplit(".", 1)[-1] for name in chosen}
    # PEFT takes modules to save by the ends of names, also in the midst of a part
    meant = [name for name in modules if name.endswith(tuple(last))]
    return sorted(last) if set(meant) == set(chosen) else chosen


def _one(model: Any, name: str, modules: dict[str, nn.Module], linear: list[str]) -> list[str]:
    if name in _EMBEDDING:
        return [str(_name_of(modules, model.get_input_embeddings()))]
    if name in _DEFAULT:
        kind = model.config.model_type
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if defaults is None:
            raise ConfigError(
                f"--target_modules {name}: PEFT has no default for a model of type {kind}; expected all-linear or "
                f"some of {_kinds(linear)}"
            )
        return [found for found in linear if found.rsplit(".", 1)[-1] in defaults]
    embeddings = [found for found, child in modules.items() if isinstance(child, nn.Embedding)]
    return _named("target_modules", name, modules, [*linear, *embeddings])


def _named(setting: str, name: str, modules: dict[str, nn.Module], able: list[str]) -> list[str]:
    found = [other for other in able if other == name or other.endswith(f".{name}")]
    if found:
        return found
    fits = any(other == name or other.endswith(f".{name}") for other in modules)
    fault = "is no linear layer or embedding" if fits else "names no module"
    kinds = _kinds(able if len(able) < len(modules) else _with_weights(modules))
    raise ConfigError(f"--{setting} {name} {fault} of this model; expected some of {kinds}")


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in modules)


def _with_weights(modules: dict[str, nn.Module]) -> list[str]:
    return [name for name, child in modules.items() if any(True for _ in child.parameters(False))]


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _name_of(modules: dict[str, nn.Module], wanted: nn.Module | None) -> str | None:
    return next((name for name, child in modules.items() if child is wanted), None)


def _in_layers(names: set[str], layers: list[int]) -> set[str]:
    numbered = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    missing = set(layers) - set(numbered.values())
    if missing:
        raise ConfigError(
            f"--layers_to_transform {min(missing)} is out of range: the layers of this model with such modules are "
            f"{min(numbered.values(), default=0)} to {max(numbered.values(), default=0)}"
        )
    return {name for name, layer in numbered.items() if layer in layers}


def _check_embedding(config: TrainConfig, modules: dict[str, nn.Module], adapted: set[str]) -> None:
    embeddings = [name for name in adapted if isinstance(modules[name], nn.Embedding)]
    if embeddings and config.tuner_type != "lora":
        raise ConfigError(
            f"--tuner_type {config.tuner_type} puts no adapter on the embedding {embeddings[0]}; --modules_to_save "
            "EMBEDDING trains it whole"
        )
    if embeddings and config.changes_base:
        raise ConfigError(
            f"--init_weights {config.init_weights} starts no adapter on the embedding {embeddings[0]}; "
            "--modules_to_save EMBEDDING trains it whole"
        )
