"""The rows of new tokens beside an adapter: those of embedding and head are trained, and saved alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sftcore.errors import ConfigError
from sftcore.tuners.targets import Targets

if TYPE_CHECKING:
    from torch import nn


def rows_of(model: Any, targets: Targets, new_rows: Sequence[int]) -> dict[str, list[int]] | None:
    """Returns PEFT's `trainable_token_indices`: the rows by the name of the module; None where all rows are trained.

    A head that shares its weight with the embedding follows it; one with a weight of its own has rows of its own.

    Args:
        model: A causal language model of Transformers, without an adapter.
        targets: What is trained beside.
        new_rows: The rows.

    Raises:
        ConfigError: The embedding gets an adapter, or the head has biases, which PEFT would leave out.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[int]] = {}
    is_tied = head is not None and head.weight is embedding.weight
    for module in (embedding,) if is_tied or head is None else (embedding, head):
        name = names[id(module)]
        if name in targets.adapted:
            raise ConfigError(
                f"--new_special_tokens cannot be used with an adapter on {name}; leave it out of --target_modules, or "
                "train it whole with --modules_to_save"
            )
        if name not in targets.saved:
            found[name] = list(new_rows)
    if head is not None and getattr(head, "bias", None) is not None and not targets.saved:
        raise ConfigError(
            f"--new_special_tokens cannot be used with an adapter on this model: its head {names[id(head)]} has "
            "biases, which PEFT leaves out beside trained rows; take --tuner_type full"
        )
    return found or None


def keep_rows_alone(tuned: Any) -> None:
    """Makes a model of PEFT save the rows of new tokens, not the embedding that was made longer for them.

    Args:
        tuned: The model with its adapter.
    """
    tuned.save_pretrained = functools.partial(tuned.save_pretrained, save_embedding_layers=False)


def check_trained(model: nn.Module) -> None:
    """Raises a ConfigError where embedding or head is frozen, so that rows of new tokens would stay as they began.

    Args:
        model: A causal language model of Transformers with all that is frozen set so.
    """
    inner: Any = model
    for module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
        if module is not None and not module.weight.requires_grad:
            name = next(name for name, other in model.named_modules() if other is module)
            raise ConfigError(
                f"--new_special_tokens needs {name} to be trained, and it is frozen: the new tokens would learn "
                "nothing; leave it out of what is frozen, or take --tuner_type lora, which trains the new rows alone"
            )
