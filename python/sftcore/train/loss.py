"""The loss of trained tokens, computed so that the logits of a batch never exist.

In come the hidden states of the trained tokens alone, the head and their labels; out come the sum of the losses, with
gradients, and for each token its plain loss and whether it was the likeliest. The head is applied to a chunk
of tokens at a time, and the gradient of a chunk is taken at once, while its logits are there: what is kept is one
gradient of the size of the hidden states, and one of the size of the head where the head is trained.
The values are those of `torch.nn.functional.cross_entropy` on float32 logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is minimised beyond the cross entropy of the labels.

    Attributes:
        label_smoothing: The share of the target spread over the vocabulary (Szegedy et al. 2016, arXiv:1512.00567).
        z_loss: Times the squared logarithm of the softmax denominator (Chowdhery et al. 2022, arXiv:2204.02311).
        dft: Whether a token weighs as much as the probability of its label, held constant (Wu et al. 2025,
            arXiv:2508.05629).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is the cross entropy and nothing else."""
        return not (self.label_smoothing or self.z_loss or self.dft)


class TokenLosses(NamedTuple):
    """The losses of trained tokens.

    Attributes:
        total: Their weighted sum under the objective, float32, with gradients.
        losses: The cross entropy of each, float32 `[tokens]`, without gradients, weights or objective.
        right: Whether each label was the likeliest token, bool `[tokens]`.
    """

    total: Tensor
    losses: Tensor
    right: Tensor


def losses_of_logits(
    logits: Tensor, labels: Tensor, weights: Tensor | None, objective: Objective
) -> TokenLosses:
    """Returns the losses of logits that are there.

    Args:
        logits: Any float type, `[tokens, vocabulary]`.
        labels: int64, `[tokens]`.
        weights: float32, `[tokens]`: how much each token counts; None where all count 1.
        objective: What is minimised.
    """
    logits = logits.float()
    plain = functional.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        losses = plain.detach()
        of_label = logits.gather(1, labels[:, None]).squeeze(1)
        right = of_label >= logits.amax(dim=1)
    if objective.label_smoothing:
        minimised = functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=objective.label_smoothing
        )
    elif objective.dft:
        minimised = plain * torch.exp(-losses)
    else:
        minimised = plain
    if objective.z_loss:
        minimised = minimised + objective.z_loss * torch.logsumexp(logits, dim=1).square()
    if weights is not None:
        minimised = minimised * weights
    return TokenLosses(minimised.sum(), losses, right)


def chunked_losses(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    head: Head,
    parameters: list[nn.Parameter],
    objective: Objective,
    chunk_size: int,
    gradients_in_forward: bool = True,
) -> TokenLosses:
    """Returns the losses of hidden states, the head being applied to `chunk_size` tokens at a time.

    Args:
        hidden: The last hidden states of trained tokens, `[tokens, width]`.
        labels: int64, `[tokens]`: what each of them should predict.
        weights: float32, `[tokens]`, or None where all count 1.
        head: Hidden states to logits, with all that the model does to them.
        parameters: The trained parameters that `head` reads; an adapter on the head has some too.
        objective: What is minimised.
        chunk_size: Tokens of a chunk.
        gradients_in_forward: Whether gradients are taken while the logits of a chunk are there. Otherwise a chunk is
            computed again in the backward pass, which engines that gather parameters by hooks need.
    """
    if not torch.is_grad_enabled():
        parts = [
            losses_of_logits(head(part), label, weight, objective)
            for part, label, weight in _chunks(hidden, labels, weights, chunk_size)
        ]
        return _join(parts, hidden)
    if gradients_in_forward:
        total, losses, right = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, labels, weights, head, objective, chunk_size, *parameters
        )
        return TokenLosses(total, losses, right)

    def of_chunk(part: Tensor, label: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(losses_of_logits(head(part), label, weight, objective))

    parts = [
        TokenLosses(*checkpoint(of_chunk, part, label, weight, use_reentrant=False))
        for part, label, weight in _chunks(hidden, labels, weights, chunk_size)
    ]
    return _join(parts, hidden)


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Returns the tokens whose float32 logits take 64 MB on a CPU, where caches are small, and 512 MB on a GPU."""
    values = 2**24 if device.type == "cpu" else 2**27
    return max(32, values // max(vocabulary, 1))


def _chunks(
    hidden: Tensor, labels: Tensor, weights: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield hidden[part], labels[part], None if weights is None else weights[part]


def _join(parts: list[TokenLosses], hidden: Tensor) -> TokenLosses:
    if not parts:
        # nothing is trained here, but the graph reaches all parameters, as other ranks wait for their gradients
        return TokenLosses(
            hidden.float().sum() * 0.0,
            hidden.new_zeros(0, dtype=torch.float32),
            hidden.new_zeros(0, dtype=torch.bool),
        )
    totals, losses, right = zip(*parts, strict=True)
    return TokenLosses(torch.stack(totals).sum(), torch.cat(losses), torch.cat(right))


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradients of each chunk in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        head: Head,
        objective: Objective,
        chunk_size: int,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = ctx.needs_input_grad
        trained = [p for p, need in zip(parameters, needs[6:], strict=True) if need]
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        # float32, so that the sum over chunks does not round to the dtype of the weights
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        parts = []
        for start in range(0, len(labels), chunk_size):
            chosen = slice(start, start + chunk_size)
            weight = None if weights is None else weights[chosen]
            with torch.enable_grad():
                part = hidden[chosen].detach().requires_grad_(of_hidden is not None)
                losses = losses_of_logits(head(part), labels[chosen], weight, objective)
                wanted = [*([part] if of_hidden is not None else []), *trained]
                found = list(torch.autograd.grad(losses.total, wanted, allow_unused=True))
            if of_hidden is not None:
                of_hidden[chosen] = found.pop(0)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
            parts.append(TokenLosses(*(value.detach() for value in losses)))
        joined = _join(parts, hidden.detach())
        kept = [gradient.to(p.dtype) for gradient, p in zip(sums, trained, strict=True)]
        ctx.save_for_backward(*([of_hidden] if of_hidden is not None else []), *kept)
        ctx.has_hidden = of_hidden is not None
        ctx.needs = needs[6:]
        ctx.mark_non_differentiable(joined.losses, joined.right)
        return joined.total, joined.losses, joined.right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        # a scalar does not widen the dtype of what it multiplies
        saved = [gradient * scale for gradient in ctx.saved_tensors]
        of_hidden = saved.pop(0) if ctx.has_hidden else None
        of_parameters = [saved.pop(0) if need else None for need in ctx.needs]
        return (of_hidden, None, None, None, None, None, *of_parameters)
