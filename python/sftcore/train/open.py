"""From a configuration to a model that is ready to be trained, with all that was chosen for it.

What is chosen (dtype, attention kernel, loss, how batches are laid out) is tried on the very model before it is
believed, and each choice is said in a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.models import load_model, load_settings
from sftcore.models.attention import choose_attention
from sftcore.models.checkpointing import require_gpu
from sftcore.models.dtypes import choose_dtypes
from sftcore.models.new_tokens import NewTokens, extend_embedding
from sftcore.models.quantization import quantization_config
from sftcore.train.distributed.engine import Engine
from sftcore.train.inputs import InputKind
from sftcore.train.method import LossMethod
from sftcore.train.probe import compare_packed, needs_mask
from sftcore.train.proofs import Proof, coverage_proof, packing_proof
from sftcore.tuners import apply_tuner, count_parameters, describe_parameters, notes_on_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A model to train.

    Attributes:
        model: With the tuner put on.
        method: How its losses are computed.
        padding_reason: Why examples cannot share a row although the settings ask for it; None where they can.
        lines: What was chosen, for people.
        proofs: What was checked so far, and how near it came.
    """

    model: Any
    method: LossMethod
    padding_reason: str | None
    lines: list[str]
    proofs: list[Proof]


def open_model(
    config: TrainConfig, folder: Path, engine: Engine, new_tokens: NewTokens | None = None
) -> Opened:
    """Loads a model as `config` says.

    Args:
        config: The settings of the run.
        folder: The model.
        engine: How the processes share the run.
        new_tokens: What was added to its tokenizer, if anything.

    Raises:
        ConfigError: A setting does not fit the model or the machine.
    """
    require_gpu(config)
    settings = load_settings(folder, trust_remote_code=config.trust_remote_code)
    _check_length(config, settings)
    dtypes = choose_dtypes(config.torch_dtype, trains_weights=config.trains_weights)
    attention = choose_attention(config.attn_impl, settings, dtypes.compute, training=True)
    engine.meet(settings)
    base = load_model(
        folder,
        torch_dtype=str(dtypes.weights).removeprefix("torch."),
        attn_impl=attention.name,
        trust_remote_code=config.trust_remote_code,
        quantization_config=quantization_config(config, dtypes.compute),
        **engine.load_arguments(),
    )
    if new_tokens is not None:
        extend_embedding(base, new_tokens)
    # a cache is of no use in training, and with one packed rows are taken for single sequences
    base.config.use_cache = False
    base = engine.place(base)
    lines = [f"attention: {attention.name} ({attention.reason})"]
    whole = engine.runnable(base)
    kind = InputKind(needs_mask=needs_mask(whole), is_flash=attention.is_flash)
    shares_rows = config.packing or config.padding_free
    padding_reason, distance = compare_packed(whole, kind) if shares_rows else (None, None)
    if padding_reason:
        lines.append(
            f"warning: examples do not share rows, as {padding_reason}; they are padded instead, in buckets of like "
            "length"
        )
    with engine.skeleton(base):
        notes = notes_on_targets(base, config)
        model = apply_tuner(base, config, new_tokens.rows if new_tokens else ())
        total, trained = count_parameters(model)
        table = describe_parameters(model)
        proofs = [
            packing_proof(padding_reason, distance, asked=shares_rows),
            coverage_proof(model, config),
        ]
    name = str(base.dtype).removeprefix("torch.")
    lines.append(
        f"model: {config.model}, {total:,} parameters in {name}, {trained:,} trained ({trained / total:.2%})"
    )
    lines.append(table)
    lines += notes
    method = engine.choose_loss(model, kind)
    if method.reason and config.loss_impl == "auto":
        lines.append(f"loss: the logits of whole batches are computed, as {method.reason}")
    if dtypes.warning and not engine.has_master_weights:
        lines.append(f"warning: {dtypes.warning}")
    return Opened(
        model=model, method=method, padding_reason=padding_reason, lines=lines, proofs=proofs
    )


def padded(config: TrainConfig, world_size: int) -> TrainConfig:
    """Returns the settings with padding in place of packs; a micro-batch has as many tokens as before, and so a step.

    Args:
        config: The settings of the run.
        world_size: The ranks that share the data.
    """
    without = replace(config, packing=False, packing_length=None, padding_free=False)
    if not config.packing:
        return without
    tokens = (config.packing_length or config.max_length) * config.per_device_train_batch_size
    eval_batch_size = config.per_device_eval_batch_size
    if config.val_dataset or config.holds_out:
        eval_batch_size = eval_batch_size or config.per_device_train_batch_size
    return replace(
        without,
        tokens_per_batch=tokens,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=eval_batch_size,
        # the default follows the number of packs in a micro-batch, which the line above changes
        gradient_accumulation_steps=config.accumulation_steps(world_size),
    )


def _check_length(config: TrainConfig, settings: Any) -> None:
    limit = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"--max_length {config.max_length} is out of range: {config.model} has {limit} positions; pass "
            f"--max_length {limit} or less"
        )
