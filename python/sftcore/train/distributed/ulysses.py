"""Sequence parallelism by exchanging heads for tokens (Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

The ranks of a group get the same batch, and each works on its part of every sequence; around attention, which looks at
whole sequences, they exchange tokens for heads, so that each has all tokens of some heads. What is summed over a group
is what one rank would have; its gradients lie in parts on all ranks, so an engine that averages over all of them (plain
data parallelism or ZeRO) sums them up right. What a batch says of its own borders is known to all ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.models import load_settings, resolve_model
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.world import World
from sftcore.train.head import plain_losses, take_targets
from sftcore.train.inputs import InputKind, model_inputs
from sftcore.train.loss import TokenLosses
from sftcore.train.method import LossMethod

# how a call of the model that is shared says so, all the way down to attention
_SHARED = "shared_sequence"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSequence:
    """A batch whose sequences are spread over the ranks of a group.

    Attributes:
        group: The ranks.
        size: Their number.
        positions: Of all tokens, int64 `[rows, length]`.
        is_packed: Whether they restart within a row, where another example begins.
        masks: By window, what attention may see, once it was asked for.
    """

    group: Any
    size: int
    positions: Tensor
    is_packed: bool
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """Returns which tokens see which, bool `[rows, 1, length, length]`; None where each sees all before it.

        Args:
            window: The number of tokens that a token sees, itself among them; None where there is no limit.
        """
        length = self.positions.shape[1]
        if window is not None and window >= length:
            window = None
        if window not in self.masks:
            self.masks[window] = self._make_mask(window)
        return self.masks[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        if window is None and not self.is_packed:
            return None
        rows, length = self.positions.shape
        places = torch.arange(length, device=self.positions.device)
        distance = places[:, None] - places[None, :]
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        seen = seen.expand(rows, 1, length, length)
        if not self.is_packed:
            return seen
        examples = (self.positions == 0).cumsum(dim=1)
        return seen & (examples[:, None, :, None] == examples[:, None, None, :])


class _Exchange(torch.autograd.Function):
    """Part i of rank j goes to rank i, where it is part j; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # what is like a tensor has its strides too, and the exchange fills memory in order
        gradient = gradients[0].contiguous()
        found = torch.empty_like(gradient)
        dist.all_to_all_single(found, gradient, group=ctx.group)
        return found, None


def tokens_for_heads(states: Tensor, shared: SharedSequence) -> Tensor:
    """From all heads of some tokens, `[rows, heads, part, width]`, to some heads of all tokens."""
    rows, heads, part, width = states.shape
    parts = states.reshape(rows, shared.size, heads // shared.size, part, width).transpose(0, 1)
    found: Tensor = _Exchange.apply(parts.contiguous(), shared.group)  # type: ignore[no-untyped-call]
    # the first dimension is now the part of the sequence
    return found.permute(1, 2, 0, 3, 4).reshape(
        rows, heads // shared.size, shared.size * part, width
    )


def heads_for_tokens(states: Tensor, shared: SharedSequence) -> Tensor:
    """From some heads of all tokens, `[rows, length, heads, width]`, to all heads of some tokens."""
    rows, length, heads, width = states.shape
    parts = states.reshape(rows, shared.size, length // shared.size, heads, width).transpose(0, 1)
    found: Tensor = _Exchange.apply(parts.contiguous(), shared.group)  # type: ignore[no-untyped-call]
    # the first dimension is now the part of the heads
    return found.permute(1, 2, 0, 3, 4).reshape(
        rows, length // shared.size, shared.size * heads, width
    )


def share_attention(name: str) -> None:
    """Makes an attention kernel of Transformers exchange tokens for heads in calls that are shared.

    Any other call is as it was.
    """
    plain = ALL_ATTENTION_FUNCTIONS[name]

    @functools.wraps(plain)
    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        shared: SharedSequence | None = kwargs.pop(_SHARED, None)
        if shared is None:
            return plain(module, query, key, value, attention_mask, *args, **kwargs)
        query, key, value = (tokens_for_heads(states, shared) for states in (query, key, value))
        if "position_ids" in kwargs:
            kwargs["position_ids"] = shared.positions
        # flash kernels take the borders of examples and the window by themselves
        is_flash = "flash" in name
        mask = None if is_flash else shared.mask(kwargs.get("sliding_window"))
        output, _ = plain(module, query, key, value, mask, *args, **kwargs)
        return heads_for_tokens(output, shared), None

    ALL_ATTENTION_FUNCTIONS[name] = attend


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedLoss(LossMethod):
    """The losses of batches whose sequences the ranks of a group share.

    Attributes:
        group: The ranks.
        rank: This one among them.
        size: Their number.
    """

    group: Any
    rank: int
    size: int

    def losses(self, model: Any, batch: dict[str, Any]) -> tuple[TokenLosses, Tensor | None]:
        """Returns the losses of a batch, which is that of all ranks of the group.

        The sum has the value of the whole batch and, times the ranks of the group, the gradient of this rank's part.
        """
        inputs = model_inputs(batch, self.kind)
        part, trained = self._split(inputs)
        is_trained = part["targets"] != -100
        if self.is_chunked:
            output = model(**part, trained_tokens=True)
            own = TokenLosses(output["loss"], output["losses"], output["right"])
        else:
            own, extra = plain_losses(model, part, self.objective)
            if extra is not None:
                raise ConfigError(
                    f"--sequence_parallel_size {self.size} cannot be used with a model that adds a loss of its own"
                )
        return self._join(own, is_trained, trained), None

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Returns this rank's part of a batch, and which tokens of the whole batch are trained."""
        targets, weights = take_targets(inputs)
        ids = inputs.pop("input_ids")
        rows, length = ids.shape
        surplus = -length % self.size
        positions = inputs.pop("position_ids", None)
        is_packed = positions is not None
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand(rows, length)
        if surplus:
            # what is put at the end is an example of its own, of which nothing is trained
            ids, targets = (
                functional.pad(values, (0, surplus), value=filler)
                for values, filler in ((ids, 0), (targets, -100))
            )
            more = torch.arange(surplus, device=ids.device).expand(rows, surplus)
            positions = torch.cat([positions, more if is_packed else more + length], dim=1)
            weights = None if weights is None else functional.pad(weights, (0, surplus))
            inputs |= _more_borders(inputs, length + surplus, surplus)
        shared = SharedSequence(
            group=self.group, size=self.size, positions=positions, is_packed=is_packed
        )
        width = (length + surplus) // self.size
        own = slice(self.rank * width, (self.rank + 1) * width)
        part = {
            **inputs,
            "input_ids": ids[:, own],
            "position_ids": positions[:, own],
            "targets": targets[:, own],
            _SHARED: shared,
        }
        if weights is not None:
            part["target_weights"] = weights[:, own]
        return part, targets != -100

    def _join(self, own: TokenLosses, is_own: Tensor, is_trained: Tensor) -> TokenLosses:
        """From the trained tokens of this rank to those of the whole batch, row by row.

        Args:
            own: The losses of this rank's part.
            is_own: Where its trained tokens are, bool `[rows, part]`.
            is_trained: Where those of the whole batch are, bool `[rows, length]`.
        """
        values = torch.zeros(2, *is_own.shape, dtype=torch.float32, device=is_own.device)
        values[0][is_own] = own.losses.float()
        values[1][is_own] = own.right.float()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self.group)
        losses, right = torch.cat(parts, dim=2)[:, is_trained]
        whole = own.total.detach().clone()
        dist.all_reduce(whole, group=self.group)
        scaled = own.total * self.size
        return TokenLosses(scaled + (whole - scaled.detach()), losses, right.bool())


def _more_borders(inputs: dict[str, Any], end: int, surplus: int) -> dict[str, Any]:
    """Returns the borders that flash kernels take, with one more example at the end."""
    if "cu_seq_lens_q" not in inputs:
        return {}
    borders = functional.pad(inputs["cu_seq_lens_q"], (0, 1), value=end)
    longest = max(inputs["max_length_q"], surplus)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class SharesSequences(Engine):
    """What sequence parallelism adds to an engine that averages gradients over all ranks."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self.name = f"{self.name}, sequences in {config.sequence_parallel_size} parts"
        self._asked = f"--sequence_parallel_size {config.sequence_parallel_size}"
        self._sequence_group: Any = None
        self._shared_kernel: str | None = None

    def __enter__(self) -> Engine:
        """Joins the other ranks, and those that share sequences with this one."""
        settings = load_settings(
            resolve_model(self.config.model, weights=False),
            trust_remote_code=self.config.trust_remote_code,
        )
        check_model(settings, self.config.sequence_parallel_size)
        super().__enter__()
        size = self.config.sequence_parallel_size
        for start in range(0, self.world.size, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= self.world.rank < start + size:
                self._sequence_group = group
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the other ranks, and attention as it was."""
        if self._shared_kernel is not None:
            del ALL_ATTENTION_FUNCTIONS[self._shared_kernel]
            self._shared_kernel = None
        super().__exit__(kind, error, trace)

    def choose_loss(self, model: Any, kind: InputKind) -> LossMethod:
        """Returns how the losses of parts of sequences are computed, after it was tried on the very model.

        Raises:
            ConfigError: The model cannot be shared so.
        """
        if kind.needs_mask:
            raise ConfigError(
                f"{self._asked} cannot be used with this model, which needs a mask of padding"
            )
        method: LossMethod = super().choose_loss(model, kind)
        if self.config.dry_run:
            return method
        name = model.config._attn_implementation
        if name not in ALL_ATTENTION_FUNCTIONS:
            raise ConfigError(
                f"{self._asked} cannot be used with --attn_impl {name}; take sdpa or a flash kernel"
            )
        share_attention(name)
        self._shared_kernel = name
        size = self.config.sequence_parallel_size
        shared = SharedLoss(
            objective=method.objective,
            kind=method.kind,
            is_chunked=method.is_chunked,
            reason=method.reason,
            group=self._sequence_group,
            rank=self.world.rank % size,
            size=size,
        )
        if fault := self._why_not_shared(method, shared, model):
            raise ConfigError(f"{self._asked} cannot be used with this model: {fault}")
        return shared

    def _why_not_shared(self, method: LossMethod, shared: SharedLoss, model: Any) -> str | None:
        """Returns what goes wrong when sequences are shared; None where nothing does."""
        is_packed = self.config.packing or self.config.padding_free
        batch = _example_batch(model, 4 * shared.size + 1, is_packed=is_packed)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                expected, _ = method.losses(model, batch)
                found, _ = shared.losses(model, batch)
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            model.train(was_training)
        distance = float((found.losses - expected.losses).abs().max())
        is_exact = next(model.parameters()).dtype == torch.float32
        if distance <= (1e-3 if is_exact else 0.1):
            return None
        return f"losses differ by {distance:.2g} from those of whole sequences"


def check_model(settings: Any, size: int) -> None:
    """Raises a ConfigError where the sequences of a model cannot be shared by so many ranks.

    Args:
        settings: The configuration of the model.
        size: The ranks of a group.
    """
    asked = f"--sequence_parallel_size {size}"
    text = settings.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kinds = set(getattr(text, "layer_types", None) or []) - _PLAIN_LAYERS
    if not heads or kinds:
        what = f"layers of {', '.join(sorted(kinds))}" if kinds else "no attention heads"
        raise ConfigError(
            f"{asked} cannot be used with {settings.model_type}, which has {what}; only attention over tokens can be "
            "shared by heads"
        )
    pairs = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or pairs % size:
        fitting = [n for n in range(1, pairs + 1) if not heads % n and not pairs % n]
        raise ConfigError(
            f"{asked} does not divide the {heads} heads and {pairs} key-value heads of this model; expected one of "
            f"{', '.join(map(str, fitting))}"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            raise ConfigError(
                f"{asked} cannot be used with {settings.model_type}, whose positions depend on the length of the whole "
                f"sequence ({part['rope_type']})"
            )


def _example_batch(model: Any, length: int, *, is_packed: bool) -> dict[str, Any]:
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, length), generator=generator).to(device)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if is_packed:
        first = length // 3
        row = torch.cat([torch.arange(first), torch.arange(length - first)])
        ends = [0, first, length, length + first, 2 * length]
        batch["position_ids"] = row.expand(2, length).to(device)
        batch["cu_seqlens"] = torch.tensor(ends, device=device)
    return batch


class UlyssesEngine(SharesSequences, Engine):
    """Sequence parallelism on plain data parallelism."""


def sequence_engine(config: TrainConfig, world: World) -> Engine:
    """Returns the engine for `--sequence_parallel_size`, on ZeRO where `--deepspeed` is given."""
    if config.deepspeed is None:
        return UlyssesEngine(config, world)
    from sftcore.train.distributed.deepspeed import DeepSpeedEngine

    class UlyssesDeepSpeedEngine(SharesSequences, DeepSpeedEngine):
        """Sequence parallelism on ZeRO."""

    return UlyssesDeepSpeedEngine(config, world)
