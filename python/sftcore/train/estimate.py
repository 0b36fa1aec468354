"""How much memory and arithmetic a step needs, found without weights and without the memory.

The model is built of fake tensors, which have shapes and dtypes but no values, so that a laptop can ask about 70
billion parameters. One micro-batch then goes forward, through the loss and backward for real, with the run's attention,
checkpointing, dtypes and tuner; every tensor that would come to life and go is counted. What allocators round up
and libraries keep for themselves is not: see docs/watching.md for how far that is off.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from sftcore.config import TrainConfig
from sftcore.models.attention import Attention
from sftcore.models.checkpointing import checkpointing_arguments
from sftcore.models.dtypes import Dtypes
from sftcore.train.head import after_head, causal_model
from sftcore.train.loss import Objective, chunked_losses, default_chunk_size, losses_of_logits
from sftcore.tuners import apply_tuner

# values of optimizer state for each trained one, by the name in Transformers, and the bytes of one; None is
# as many as the parameter has
_STATES: dict[str, tuple[float, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_torch_8bit": (2, 1),
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "ademamix": (3, None),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "lion_32bit": (1, 4),
    "lion_8bit": (1, 1),
    "sgd": (0, None),
    "adafactor": (0.01, 4),
}
_KEPT_ON_HOST = "paged"


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSize:
    """The size of a micro-batch.

    Attributes:
        rows: Rows of the rectangle.
        width: Its width in tokens.
        trained_tokens: Labels in it.
    """

    rows: int
    width: int
    trained_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a micro-batch needs; sizes are bytes.

    Attributes:
        parameters: Of the model and the tuner.
        trained_parameters: Those that are trained.
        trained_kinds: These, by the name of the module that they are in.
        weights: All parameters and buffers.
        gradients: Those of trained parameters.
        optimizer: The state of the optimizer.
        activations: What is kept for the backward pass.
        loss: What the loss takes beyond that.
        peak: The most at any time, all of the above included.
        peak_other: The same with gradient checkpointing the other way round.
        flops: Floating-point operations of forward and backward pass.
        notes: What was assumed.
    """

    parameters: int
    trained_parameters: int
    trained_kinds: dict[str, dict[str, int]]
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    peak: int
    peak_other: int
    flops: int
    notes: list[str]


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are alive, each storage once.

    Attributes:
        now: Bytes of those made since it began and still there.
        peak: The most that `now` was since `reset_peak`.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and counts what it made."""
        found = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, found)
        return found

    def reset_peak(self) -> None:
        """Begins a new peak at what there is now."""
        self.peak = self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def estimate_step(
    config: TrainConfig,
    settings: Any,
    size: BatchSize,
    *,
    dtypes: Dtypes,
    attention: Attention,
    optimizer: str,
    accumulates: bool,
) -> Estimate:
    """Returns what a micro-batch of a run needs.

    Args:
        config: The settings of the run.
        settings: The configuration of the model (`AutoConfig`).
        size: The micro-batch.
        dtypes: Those of the run.
        attention: Its kernel.
        optimizer: Its optimizer, by the name in Transformers.
        accumulates: Whether gradients of an earlier micro-batch are there.

    Raises:
        NotImplementedError: The model decides by values what it computes, so it cannot be run without them.
    """
    try:
        asked = _trace(config, settings, size, dtypes, attention, accumulates)
        turned = replace(
            config,
            gradient_checkpointing=not config.gradient_checkpointing,
            gradient_checkpointing_kind="full",
        )
        other = _trace(turned, settings, size, dtypes, attention, accumulates)
    except (RuntimeError, TypeError, AttributeError) as error:
        # fake tensors raise kinds of RuntimeError where a value is asked for
        raise NotImplementedError(
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    state, notes = _optimizer_bytes(optimizer, asked.trained_bytes, asked.trained)
    if attention.is_flash:
        notes.append(f"{attention.name} is counted as PyTorch's own fused attention")
    if config.gradient_checkpointing_kind == "offload" or config.activation_offload:
        notes.append("what is offloaded to the host is counted as if it stayed")
    fixed = asked.weights + state
    # the update needs a few tensors as large as the largest parameter
    update = fixed + asked.trained_bytes + 2 * asked.largest_trained
    return Estimate(
        parameters=asked.parameters,
        trained_parameters=asked.trained,
        trained_kinds=asked.kinds,
        weights=asked.weights,
        gradients=asked.trained_bytes,
        optimizer=state,
        activations=asked.activations,
        loss=asked.loss,
        peak=max(fixed + asked.peak, update),
        peak_other=max(fixed + other.peak, update),
        flops=asked.flops,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    parameters: int
    trained: int
    trained_bytes: int
    largest_trained: int
    kinds: dict[str, dict[str, int]]
    weights: int
    activations: int
    loss: int
    peak: int
    flops: int


def _trace(
    config: TrainConfig,
    settings: Any,
    size: BatchSize,
    dtypes: Dtypes,
    attention: Attention,
    accumulates: bool,
) -> _Trace:
    with torch.device("meta"):
        model = _build(config, settings, dtypes, attention)
    with FakeTensorMode():
        _make_fake(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        memory = TensorMemory(chain(parameters, model.buffers()))
        counter = FlopCounterMode(display=False)
        with memory, counter:
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            memory.reset_peak()
            before = memory.now
            with _autocast(dtypes):
                hidden = _decode(config, model, size, attention)
            activations = memory.now - before
            of_forward = memory.peak
            memory.reset_peak()
            held = memory.now
            with _autocast(dtypes):
                total = _loss(config, model, hidden, size)
            of_loss = memory.peak
            total.backward()  # type: ignore[no-untyped-call]
            peak = max(of_forward, of_loss, memory.peak)
        return _Trace(
            parameters=sum(parameter.numel() for parameter in parameters),
            trained=sum(parameter.numel() for parameter in trained),
            trained_bytes=sum(_bytes(parameter) for parameter in trained),
            largest_trained=max((_bytes(parameter) for parameter in trained), default=0),
            kinds=trained_kinds(model),
            weights=sum(_bytes(tensor) for tensor in chain(parameters, model.buffers())),
            activations=activations,
            loss=of_loss - held,
            peak=peak,
            flops=counter.get_total_flops(),
        )


def _build(config: TrainConfig, settings: Any, dtypes: Dtypes, attention: Attention) -> Any:
    base = AutoModelForCausalLM.from_config(
        settings,
        dtype=dtypes.weights,
        attn_implementation="eager" if attention.name == "eager" else "sdpa",
        trust_remote_code=config.trust_remote_code,
    )
    base.config.use_cache = False
    model = apply_tuner(base, config)
    model.train()
    if config.gradient_checkpointing:
        kind = config.gradient_checkpointing_kind
        # the offloading kind needs a GPU, and keeps what the full one keeps
        arguments = checkpointing_arguments("full" if kind == "offload" else kind)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return model


def _make_fake(model: nn.Module) -> None:
    """Puts fake tensors on the CPU in place of meta tensors, which have no kernels of their own for attention."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype
                    )
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _decode(config: TrainConfig, model: Any, size: BatchSize, attention: Attention) -> Tensor:
    ids = torch.zeros(size.rows, size.width, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if (config.packing or config.padding_free) and not attention.is_flash:
        # examples that share a row are kept apart by a mask of all pairs
        inputs["attention_mask"] = torch.ones(
            size.rows, 1, size.width, size.width, dtype=torch.bool
        )
    hidden: Tensor = causal_model(model).base_model(**inputs).last_hidden_state
    return hidden


def _loss(config: TrainConfig, model: Any, hidden: Tensor, size: BatchSize) -> Tensor:
    base = causal_model(model)
    module, change = base.get_output_embeddings(), after_head(base.config)
    objective = Objective(
        label_smoothing=config.label_smoothing, z_loss=config.z_loss, dft=config.enable_dft_loss
    )
    vocabulary = base.config.get_text_config().vocab_size
    num_labels = max(1, min(size.trained_tokens, size.rows * size.width))
    labels = torch.zeros(num_labels, dtype=torch.int64)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if config.loss_impl == "plain":
        logits = change(module(flat))
        # a copy of the rows that are trained, as the mask of labels makes one
        return losses_of_logits(logits[:num_labels].clone(), labels, None, objective).total

    def head(part: Tensor) -> Tensor:
        return change(module(part))

    return chunked_losses(
        flat[:num_labels].clone(),
        labels,
        None,
        head=head,
        parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        objective=objective,
        chunk_size=config.loss_chunk_size
        or default_chunk_size(vocabulary, torch.device("cuda" if _on_gpu() else "cpu")),
    ).total


def trained_kinds(model: nn.Module) -> dict[str, dict[str, int]]:
    """Returns the modules and parameters that are trained, by the name of the module that they are in."""
    parameters: Counter[str] = Counter()
    modules: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.split(".")
        # adapters hang below the module that they change
        end = next((place for place, part in enumerate(path) if "lora_" in part), len(path) - 1)
        kind = next(part for part in reversed(path[:end]) if not part.isdigit())
        parameters[kind] += parameter.numel()
        modules.setdefault(kind, set()).add(".".join(path[:end]))
    return {
        kind: {"modules": len(modules[kind]), "parameters": count}
        for kind, count in parameters.most_common()
    }


def _optimizer_bytes(name: str, trained_bytes: int, trained: int) -> tuple[int, list[str]]:
    if name.startswith(_KEPT_ON_HOST):
        return 0, [f"{name} keeps its state in the memory of the host"]
    if name not in _STATES:
        return 2 * trained_bytes, [
            f"{name} is counted as AdamW, whose state is twice the trained weights"
        ]
    number, width = _STATES[name]
    return int(number * (trained_bytes if width is None else trained * width)), []


def _autocast(dtypes: Dtypes) -> AbstractContextManager[Any]:
    if dtypes.weights == dtypes.compute:
        return nullcontext()
    # fake tensors stand on the CPU, whatever device the run is for
    return torch.autocast("cpu", dtype=dtypes.compute)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_gpu() -> bool:
    return torch.cuda.is_available()
