"""Gives a model a forward pass that returns losses of trained tokens, in place of the logits of all.

The losses are computed inside the model's own forward, so that the hooks of adapters, DDP, FSDP and ZeRO run. What
a model does to its logits after the head (a scale, a soft cap) is read from its configuration; whether
that is all it does is not believed but tried: `why_not_chunked` compares with the plain forward on the very model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from sftcore.models.shapes import full_shape
from sftcore.train.loss import (
    Objective,
    TokenLosses,
    chunked_losses,
    default_chunk_size,
    losses_of_logits,
)


@dataclass
class TrainedTokens(ModelOutput):  # type: ignore[misc, unused-ignore]
    """What the forward pass returns for training.

    Attributes:
        loss: The weighted sum over trained tokens, float32, with gradients.
        losses: The cross entropy of each trained token, float32 `[tokens]`, row by row.
        right: Whether each was the likeliest token, bool `[tokens]`.
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    right: Tensor | None = None


def shift(values: Tensor, filler: float) -> Tensor:
    """Moves what belongs to a token to the token that predicts it, `[rows, length]`."""
    return functional.pad(values[:, 1:], (0, 1), value=filler)


def causal_model(model: Any) -> Any:
    """Returns the language model of Transformers inside adapters and engines."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class HeadLoss:
    """The losses of a model, computed a chunk at a time behind its own decoder."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        *,
        chunk_size: int | None,
        gradients_in_forward: bool,
        calls_head_once: bool = False,
    ) -> None:
        self.model = model
        self.objective = objective
        self.chunk_size = chunk_size
        self.gradients_in_forward = gradients_in_forward
        self.calls_head_once = calls_head_once
        self.after_head = after_head(model.config)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]  # it takes gradients itself
    def __call__(self, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> TokenLosses:
        """Returns the losses of the trained tokens of a batch.

        Args:
            hidden: The last hidden states, `[rows, length, width]`.
            targets: int64 `[rows, length]`: what each token should predict, -100 where nothing.
            weights: float32 `[rows, length]`, of the predictions, or None.
        """
        module = self.model.get_output_embeddings()
        # where layers lie on several devices, the loss is computed where the head is
        place, home = targets.device, next(iter(module.parameters()), targets).device
        hidden, targets = hidden.to(home), targets.to(home)
        weights = None if weights is None else weights.to(home)
        trained = targets != -100

        def losses(apply: Callable[[Tensor], Tensor], part: Tensor) -> TokenLosses:
            return chunked_losses(
                part,
                targets[trained],
                None if weights is None else weights[trained],
                head=lambda chunk: self.after_head(apply(chunk)),
                parameters=[p for p in module.parameters() if p.requires_grad],
                objective=self.objective,
                chunk_size=self.chunk_size
                or default_chunk_size(
                    self.model.config.get_text_config().vocab_size, hidden.device
                ),
                gradients_in_forward=self.gradients_in_forward,
            )

        part = hidden[trained]
        found = _within(module, losses, part) if self.calls_head_once else losses(module, part)
        return TokenLosses(*(value.to(place) for value in found))


def _within(module: nn.Module, losses: Callable[..., TokenLosses], hidden: Tensor) -> TokenLosses:
    """Computes the losses inside one call of the head, whose hooks give it its weights for that time."""
    plain = module.forward
    found: list[TokenLosses] = []

    def forward(part: Tensor) -> Tensor:
        found.append(losses(plain, part))
        return found[0].total

    own = vars(module).get("forward")
    module.forward = forward
    try:
        total = module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
    return TokenLosses(total, found[0].losses, found[0].right)


def take_targets(inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Takes out what each token should predict, and its weight.

    Args:
        inputs: With `labels`, and perhaps `loss_weights`; or with `targets` and `target_weights`, which are moved to
            the token that predicts them already.
    """
    weights = inputs.pop("loss_weights", None)
    if "targets" in inputs:
        return inputs.pop("targets"), inputs.pop("target_weights", None)
    return shift(inputs.pop("labels"), -100), None if weights is None else shift(weights, 0.0)


def after_head(config: Any) -> Callable[[Tensor], Tensor]:
    """Returns what a model does to its logits: a scale (Cohere, Granite, Falcon-H1) or a soft cap (Gemma)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name, invert in (
        ("logit_scale", False),
        ("logits_scaling", True),
        ("lm_head_multiplier", False),
    ):
        value = getattr(text, name, None)
        if isinstance(value, int | float) and value:
            scale *= 1 / value if invert else value
    cap = getattr(text, "final_logit_softcapping", None)

    def apply(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return apply


def install_head_loss(
    model: Any,
    objective: Objective,
    *,
    chunk_size: int | None,
    gradients_in_forward: bool = True,
    calls_head_once: bool = False,
) -> None:
    """Makes `model(..., trained_tokens=True)` return `TrainedTokens`; any other call stays as it was.

    Args:
        model: A causal language model of Transformers, bare or inside a PEFT model.
        objective: What is minimised.
        chunk_size: Tokens of a chunk of the head; None for the default of the device.
        gradients_in_forward: As in `chunked_losses`.
        calls_head_once: Whether the head is called once a forward pass, not for each chunk.
    """
    base = causal_model(model)
    plain = base.forward
    loss = HeadLoss(
        base,
        objective,
        chunk_size=chunk_size,
        gradients_in_forward=gradients_in_forward,
        calls_head_once=calls_head_once,
    )

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, trained_tokens: bool = False, **kwargs: Any) -> Any:
        if not trained_tokens:
            return plain(*args, **kwargs)
        targets, weights = take_targets(kwargs)
        outputs = self.base_model(*args, **kwargs)
        return TrainedTokens(*loss(outputs.last_hidden_state, targets, weights))

    base.forward = MethodType(forward, base)


def plain_losses(
    model: Any, inputs: dict[str, Any], objective: Objective
) -> tuple[TokenLosses, Tensor | None]:
    """Returns the losses from the logits of the whole batch, and what the model adds of its own.

    Args:
        model: Any causal language model.
        inputs: A batch, as `take_targets` knows it.
        objective: What is minimised.
    """
    rest = dict(inputs)
    targets, weights = take_targets(rest)
    outputs = model(**rest)
    trained = targets != -100
    logits = outputs.logits[trained]
    if not len(logits):
        total = outputs.logits.float().sum() * 0.0
        nothing = total.new_zeros(0)
        return TokenLosses(total, nothing, nothing.bool()), None
    losses = losses_of_logits(
        logits,
        targets[trained],
        None if weights is None else weights[trained],
        objective,
    )
    extra = getattr(outputs, "aux_loss", None)
    coefficient = getattr(causal_model(model).config, "router_aux_loss_coef", None)
    return losses, None if extra is None or not coefficient else extra * coefficient


def why_not_chunked(model: Any, *, calls_head_once: bool = False) -> str | None:
    """Returns why the head of a model cannot be taken for itself; None where it can.

    The value is compared on a short row of the model's own vocabulary, in the dtype that it has.

    Args:
        model: The model with its tuner.
        calls_head_once: As in `install_head_loss`.
    """
    base = causal_model(model)
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return f"{type(base).__name__} has no head of its own"
    if calls_head_once and any(True for _ in head.children()):
        return "the parts of its head cannot be gathered in one call"
    if base.base_model is base:
        return f"{type(base).__name__} has no decoder apart from its head"
    config = base.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        return "the model adds a loss of its experts"
    was_training = model.training
    model.eval()
    try:
        device = next(base.parameters()).device
        generator = torch.Generator().manual_seed(0)
        size = min(config.vocab_size, full_shape(base.get_input_embeddings().weight)[0])
        ids = torch.randint(0, size, (1, 12), generator=generator).to(device)
        with torch.no_grad():
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
            expected, extra = plain_losses(model, inputs, Objective())
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            loss = HeadLoss(base, Objective(), chunk_size=5, gradients_in_forward=True)
            found = loss(hidden, shift(ids, -100), None)
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        return f"its decoder cannot be run for itself ({type(error).__name__}: {error})"
    finally:
        model.train(was_training)
    if extra is not None:
        return "the model adds a loss of its own"
    tolerance = 1e-4 if head_dtype(head) == torch.float32 else 2e-2
    if not torch.allclose(found.losses, expected.losses, rtol=tolerance, atol=tolerance):
        distance = float((found.losses - expected.losses).abs().max())
        return f"the model changes its logits behind the head (losses differ by {distance:.2g})"
    return None


def head_dtype(head: nn.Module) -> torch.dtype:
    """Returns the dtype of a head's weights."""
    return next((p.dtype for p in head.parameters()), torch.float32)
