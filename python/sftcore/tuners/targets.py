"""The names that a user gives for modules, to modules of the very model.

`--target_modules`, `--exclude_modules` and `--modules_to_save` name modules by their last part, by more of their path,
or by group (all-linear, DEFAULT, EMBEDDING, LN). Experts that lie in one parameter are linear layers to all-linear, and
are named by their module or their parameter. A name that fits nothing is an error that lists what there is. A
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
from sftcore.models.shapes import full_size
from sftcore.tuners.experts import (
    fused_experts,
    is_adaptable,
    read_as_experts,
    routers,
    why_no_parameters,
)

LINEAR = (nn.Linear, Conv1D)
_EMBEDDING = ("EMBEDDING", "all-embedding")
_NORMS = ("LN", "all-norm")
_DEFAULT = ("DEFAULT", "AUTO")


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The modules of a model that are trained.

    Attributes:
        adapted: Whole names of modules that get an adapter, in the order of the model.
        parameters: Whole names of parameters that get an adapter of their own: experts that lie in one parameter,
            and weights of modules that PEFT cannot be told of otherwise.
        left_out: Whole names of what all-linear means and this tuner cannot train.
        saved: Whole names of modules trained whole, beside it.
        ties_embedding: Whether the embedding is among them and shares its weight with the head.
        ties_lora: Whether it is so and gets an adapter.
    """

    adapted: tuple[str, ...]
    parameters: tuple[str, ...]
    left_out: tuple[str, ...]
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
    parameters = dict(model.named_parameters())
    experts = fused_experts(modules)
    fused = [name for name in experts if is_adaptable(parameters[name])]
    choosers = routers(modules)
    reason = why_no_parameters(config)
    able = [*linear, *([] if reason else [*fused, *choosers])]
    adapted: set[str] = set()
    saved: set[str] = set()
    passed_by: set[str] = set()
    if config.target_regex:
        pattern = re.compile(config.target_regex)
        names = [*able, *(n for n, child in modules.items() if isinstance(child, nn.Embedding))]
        adapted.update(name for name in names if pattern.fullmatch(name))
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
                all_linear = {*linear, *([] if reason else fused)} - {*choosers}
                adapted.update(found for found in all_linear if found != head)
                passed_by.update(experts)
            else:
                adapted.update(_one(model, name, config, able, fused, choosers))
    for name in config.modules_to_save:
        if name in _NORMS:
            saved.update(norms)
        elif name in _EMBEDDING:
            saved.add(str(embedding))
        else:
            saved.update(_named("modules_to_save", name, modules, list(modules)))
    for name in config.exclude_modules:
        found = _named("exclude_modules", name, modules, [*modules, *fused])
        excluded = {other for other in adapted if _is_in(other, found)}
        unreachable = {other for other in passed_by if _is_in(other, found)}
        passed_by -= unreachable
        if not excluded | unreachable:
            raise ConfigError(
                f"--exclude_modules {name} has no effect: nothing in it would get an adapter"
            )
        adapted -= excluded
    if config.layers_to_transform:
        adapted = _in_layers(adapted, config.layers_to_transform)
        passed_by = {name for name in passed_by if _layer_of(name) in config.layers_to_transform}
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
    whole, weights = _in_parameters(model, config, modules, adapted)
    passed_by |= {f"{name}.weight" for name in adapted & {*linear} - whole}
    left_out = {name for name in passed_by - weights if not _is_in(name, saved)}
    if not whole and not weights:
        raise ConfigError(
            f"--target_modules leaves no module to put an adapter on: {why_no_parameters(config)}; take --tuner_type "
            "lora without it"
        )
    return Targets(
        adapted=tuple(name for name in modules if name in whole),
        parameters=tuple(name for name in parameters if name in weights),
        left_out=tuple(name for name in parameters if name in left_out),
        saved=tuple(name for name in modules if name in saved),
        ties_embedding=is_tied and embedding in adapted | saved,
        ties_lora=is_tied and embedding in adapted,
    )


def notes_on_targets(model: Any, config: TrainConfig) -> list[str]:
    """Returns what people should know of the modules that `config` names: what it cannot train, and why.

    Args:
        model: A causal language model of Transformers, without an adapter.
        config: The settings of the run.

    Raises:
        ConfigError: As `find_targets`.
    """
    if config.trains_weights:
        return []
    targets = find_targets(model, config)
    notes = []
    if targets.left_out:
        parameters = dict(model.named_parameters())
        size = sum(full_size(parameters[name]) for name in targets.left_out)
        share = size / sum(full_size(parameter) for parameter in parameters.values())
        kinds = sorted({".".join(name.split(".")[-2:]) for name in targets.left_out})
        reason = why_no_parameters(config) or "they lie in 8 bits or less"
        notes.append(
            f"warning: {', '.join(kinds)} ({share:.1%} of the model) get no adapter, as {reason}; --tuner_type lora "
            "trains experts, --exclude_modules leaves them out without this warning"
        )
    if targets.parameters and config.lora_dropout:
        notes.append(
            f"note: --lora_dropout {config.lora_dropout:g} is on linear layers alone; an adapter on a parameter, as on "
            "experts, has none"
        )
    return notes


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


def _in_parameters(
    model: Any, config: TrainConfig, modules: dict[str, nn.Module], adapted: set[str]
) -> tuple[set[str], set[str]]:
    """Returns the modules among what gets an adapter, and the parameters."""
    whole = {name for name in adapted if isinstance(modules.get(name), (*LINEAR, nn.Embedding))}
    others = adapted - whole
    if config.tuner_type in ("lora", "sora"):
        odd = read_as_experts(model, whole)
        whole -= odd
        if why_no_parameters(config) is None:
            # other than an expert, one that is quantized is found by its name alone
            others |= {name for name in odd if is_adaptable(modules[name].weight)}
    return whole, {f"{name}.weight" if name in modules else name for name in others}


def _one(
    model: Any,
    name: str,
    config: TrainConfig,
    able: list[str],
    fused: list[str],
    choosers: list[str],
) -> list[str]:
    modules = dict(model.named_modules())
    if name in _EMBEDDING:
        return [str(_name_of(modules, model.get_input_embeddings()))]
    if name in _DEFAULT:
        kind = model.config.model_type
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if defaults is None:
            raise ConfigError(
                f"--target_modules {name}: PEFT has no default for a model of type {kind}; expected all-linear or "
                f"some of {_kinds(able)}"
            )
        linear = [found for found in able if isinstance(modules.get(found), LINEAR)]
        return [found for found in linear if found.rsplit(".", 1)[-1] in defaults]
    embeddings = [found for found, child in modules.items() if isinstance(child, nn.Embedding)]
    named = {found for found in [*able, *embeddings, *fused, *choosers] if _ends(found, name)}
    named |= {found for found in fused if _ends(found.rpartition(".")[0], name)}
    if named and not named & {*able, *embeddings}:
        raise ConfigError(
            f"--target_modules {name} names no linear layer but experts or a router, and "
            f"{why_no_parameters(config)}; leave it out"
        )
    if named:
        return sorted(named & {*able, *embeddings})
    return _named("target_modules", name, modules, [*able, *embeddings])


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _named(setting: str, name: str, modules: dict[str, nn.Module], able: list[str]) -> list[str]:
    found = [other for other in able if _ends(other, name)]
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
    numbered = {name: number for name in names if (number := _layer_of(name)) is not None}
    missing = set(layers) - set(numbered.values())
    if missing:
        raise ConfigError(
            f"--layers_to_transform {min(missing)} is out of range: the layers of this model with such modules are "
            f"{min(numbered.values(), default=0)} to {max(numbered.values(), default=0)}"
        )
    return {name for name, layer in numbered.items() if layer in layers}


def _layer_of(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _check_embedding(config: TrainConfig, modules: dict[str, nn.Module], adapted: set[str]) -> None:
    embeddings = [name for name in adapted if isinstance(modules.get(name), nn.Embedding)]
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
