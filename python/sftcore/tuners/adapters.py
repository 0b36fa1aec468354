"""Adapters: from the settings of a tuner to a model of PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from peft import get_peft_model
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from sftcore.config import TrainConfig
from sftcore.config.tuner import LOW_RANK
from sftcore.errors import ConfigError
from sftcore.tuners.adalora import AdaLoraModel
from sftcore.tuners.exact import ADAPTER
from sftcore.tuners.experts import adapted_parameter, short_parameters
from sftcore.tuners.loftq import start_from_quantized
from sftcore.tuners.new_rows import keep_rows_alone, rows_of
from sftcore.tuners.residual import ResidualModel
from sftcore.tuners.sora import SoraModel
from sftcore.tuners.targets import Targets, find_targets, short_names
from sftcore.tuners.tied import TiedModel


def add_adapter(model: Any, config: TrainConfig, new_rows: Sequence[int] = ()) -> Any:
    """Returns the model with an adapter, the only part of it that is trained.

    Args:
        model: A causal language model of Transformers, its weights perhaps quantized.
        config: The settings of the run.
        new_rows: Rows of the embedding, and of the head, that belong to new tokens; they are trained too.

    Raises:
        ConfigError: A setting does not fit the model.
    """
    targets = find_targets(model, config)
    settings = _settings(model, config, targets)
    if new_rows:
        settings.trainable_token_indices = rows_of(model, targets, new_rows)
    kind = _kind(config, ties_lora=targets.ties_lora)
    folder = model.config.name_or_path
    try:
        with warnings.catch_warnings():
            # block sizes that do not divide a width, and the like, are settled by PEFT; the table shows how
            warnings.simplefilter("ignore")
            if kind is None:
                tuned = get_peft_model(model, settings)
            else:
                settings.base_model_name_or_path = folder
                tuned = kind(model, settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"--tuner_type {config.tuner_type} does not fit this model: {error}"
        ) from error
    if targets.parameters and config.lora_dropout:
        _drop_out(tuned, config.lora_dropout)
    if config.init_weights == "loftq":
        start_from_quantized(tuned, folder, trust_remote_code=config.trust_remote_code)
    if new_rows:
        keep_rows_alone(tuned)
    if config.lora_dtype:
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.lora_dtype))
    return tuned


def _drop_out(model: Any, share: float) -> None:
    """Sets the dropout of the LoRA of linear layers; that of parameters has none, as it never sees its input.

    The configuration says 0 for all, as PEFT loads no adapter on parameters otherwise; without training they are alike.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapted_parameter(module) is None:
            module.lora_dropout[ADAPTER] = nn.Dropout(share)


def _kind(config: TrainConfig, *, ties_lora: bool) -> Callable[[Any, Any], Any] | None:
    """Returns the class of a model that is more than PEFT's own."""
    if config.tuner_type == "lora":
        if ties_lora:
            return TiedModel
        return ResidualModel if config.changes_base else None
    kinds: dict[str, Callable[[Any, Any], Any]] = {"sora": SoraModel, "adalora": AdaLoraModel}
    return kinds.get(config.tuner_type)


def _settings(model: Any, config: TrainConfig, targets: Targets) -> Any:
    names = [name for name, _ in model.named_modules()]
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": short_names(targets.adapted, names),
        "modules_to_save": short_names(targets.saved, names) or None,
    }
    tuner = config.tuner_type
    if targets.ties_embedding and tuner not in LOW_RANK:
        raise ConfigError(
            f"--modules_to_save EMBEDDING cannot be used with --tuner_type {tuner}: the embedding shares its weight "
            "with the head, which PEFT keeps so for lora, adalora and sora alone"
        )
    if tuner in LOW_RANK:
        return _low_rank(model, config, targets, shared)
    rank: dict[str, Any] = {"r": config.lora_rank}
    alpha: dict[str, Any] = {"alpha": config.lora_alpha}
    if tuner == "ia3":
        outputs = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(
            model.config.model_type, []
        )
        inner = [name for name in targets.adapted if name.rsplit(".", 1)[-1] in outputs]
        # PEFT wants the same names in both
        is_short = shared["target_modules"] != list(targets.adapted)
        feedforward = short_names(inner, names) if is_short else inner
        return peft.IA3Config(**shared, feedforward_modules=feedforward)
    if tuner == "vera":
        return peft.VeraConfig(
            **shared,
            r=config.vera_rank,
            projection_prng_key=config.vera_projection_prng_key,
            vera_dropout=config.vera_dropout,
            d_initial=config.vera_d_initial,
        )
    if tuner == "oft":
        return peft.OFTConfig(**shared, oft_block_size=config.oft_block_size)
    if tuner == "boft":
        if config.boft_n_butterfly_factor != 1 and get_fbd_cuda() is None:
            raise ConfigError(
                f"--boft_n_butterfly_factor {config.boft_n_butterfly_factor} has no effect without the CUDA extension "
                "of PEFT, which needs a GPU and its compiler; leave it out"
            )
        return peft.BOFTConfig(
            **shared,
            boft_block_size=config.boft_block_size,
            boft_n_butterfly_factor=config.boft_n_butterfly_factor,
            boft_dropout=config.boft_dropout,
        )
    if tuner == "fourierft":
        return peft.FourierFTConfig(
            **shared,
            n_frequency=config.fourier_n_frequency,
            scaling=config.fourier_scaling,
        )
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "loha": (peft.LoHaConfig, rank | alpha),
        "lokr": (peft.LoKrConfig, rank | alpha),
        "hra": (peft.HRAConfig, rank),
        "miss": (peft.MissConfig, rank),
    }
    make, own = kinds[tuner]
    return make(**shared, **own)


def _low_rank(model: Any, config: TrainConfig, targets: Targets, shared: dict[str, Any]) -> Any:
    modules = dict(model.named_modules())
    chosen = [modules[name] for name in targets.adapted]
    if config.lora_bias != "none":
        owners = model.modules() if config.lora_bias == "all" else chosen
        if not any(getattr(owner, "bias", None) is not None for owner in owners):
            raise ConfigError(
                f"--lora_bias {config.lora_bias} has no effect: these modules have no biases"
            )
    settings = {
        **shared,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0 if targets.parameters else config.lora_dropout,
        "bias": config.lora_bias,
        # Conv1D of GPT-2 lies the other way round
        "fan_in_fan_out": any(not isinstance(child, nn.Linear | nn.Embedding) for child in chosen),
        "ensure_weight_tying": targets.ties_embedding,
    }
    if config.tuner_type == "adalora":
        return peft.AdaLoraConfig(
            **settings,
            target_r=config.adalora_target_r,
            init_r=config.adalora_init_r,
            tinit=config.adalora_tinit,
            tfinal=config.adalora_tfinal,
            deltaT=config.adalora_deltaT,
            beta1=config.adalora_beta1,
            beta2=config.adalora_beta2,
            orth_reg_weight=config.adalora_orth_reg_weight,
            # the number of steps is known once the data is read, and set before the first one
            total_step=config.adalora_tinit + config.adalora_tfinal + 1,
        )
    start = {"true": True, "false": False, "loftq": True}.get(
        config.init_weights, config.init_weights
    )
    names = [name for name, _ in model.named_parameters()]
    return peft.LoraConfig(
        **settings,
        target_parameters=short_parameters(targets.parameters, names) or None,
        r=config.lora_rank,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=start,
    )
