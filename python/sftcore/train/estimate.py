"""How much memory and arithmetic a step needs, found without weights and without the memory.

The model is built of fake tensors, which have shapes and dtypes but no values, so that a laptop can ask about 70
billion parameters. One micro-batch then goes forward, through the loss and backward for real, with the run's attention,
checkpointing, dtypes and tuner; every tensor that would come to life and go is counted. What allocators round up
and libraries keep for themselves is not: see docs/watching.md for how far that is off.
"""

from __future__ import annotations

import weakref
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
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sftcore.config import TrainConfig
from sftcore.errors import first_line
from sftcore.models.attention import Attention
from sftcore.models.checkpointing import checkpointing_arguments
from sftcore.models.dtypes import Dtypes
from sftcore.train.head import after_head, causal_model
from sftcore.train.loss import Objective, chunked_losses, default_chunk_size, losses_of_logits
from sftcore.train.optimizers import Choice
from sftcore.tuners import apply_tuner, count_parameters, notes_on_targets, trained_kinds

# what 4 and 8 bits of bitsandbytes take with their scales, in bytes of a weight
_QUANTIZED_BYTES = {4: 0.516, 8: 1.01}
_EXPERTS = "sftcore_shapes"  # experts that ask for no values, of which fake tensors have none
_SCALES_OF_4_BITS = 0.5625  # where the scales are not quantized too


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
        trained_kinds: `name`, `shape`, `modules` and `parameters` of each kind of module that has some.
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
    trained_kinds: list[dict[str, Any]]
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
    optimizer: Choice,
    accumulates: bool,
) -> Estimate:
    """Returns what a micro-batch of a run needs.

    Args:
        config: The settings of the run.
        settings: The configuration of the model (`AutoConfig`).
        size: The micro-batch.
        dtypes: Those of the run.
        attention: Its kernel.
        optimizer: Its optimizer.
        accumulates: Whether gradients of an earlier micro-batch are there.

    Raises:
        NotImplementedError: The model decides by values what it computes, so it cannot be run without them.
    """
    try:
        asked = _trace(config, settings, size, dtypes, attention, optimizer, accumulates)
        turned = replace(
            config,
            gradient_checkpointing=not config.gradient_checkpointing,
            gradient_checkpointing_kind="full",
        )
        other = _trace(turned, settings, size, dtypes, attention, None, accumulates)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        # fake tensors raise kinds of RuntimeError where a value is asked for
        raise NotImplementedError(f"{type(error).__name__}: {first_line(error)}") from error
    notes = list(asked.notes)
    if attention.is_flash:
        notes.append(f"{attention.name} is counted as PyTorch's own fused attention")
    if config.gradient_checkpointing_kind == "offload" or config.activation_offload:
        notes.append("what is offloaded to the host is counted as if it stayed")
    fixed = asked.weights + asked.state
    update = asked.weights + asked.trained_bytes + asked.peak_of_update
    return Estimate(
        parameters=asked.parameters,
        trained_parameters=asked.trained,
        trained_kinds=asked.kinds,
        weights=asked.weights,
        gradients=asked.trained_bytes,
        optimizer=asked.state,
        activations=asked.activations,
        loss=asked.loss,
        peak=max(fixed + asked.peak, update),
        peak_other=max(fixed + other.peak, update),
        flops=asked.flops,
        notes=notes,
    )


class _NoModules:
    """Counts for the whole model alone: the hooks that tell modules apart do not stand gradients in a forward pass."""

    def __init__(self) -> None:
        self.parents = {"Global"}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    parameters: int
    trained: int
    trained_bytes: int
    kinds: list[dict[str, Any]]
    weights: int
    state: int
    peak_of_update: int
    activations: int
    loss: int
    peak: int
    flops: int
    notes: list[str]


def _trace(
    config: TrainConfig,
    settings: Any,
    size: BatchSize,
    dtypes: Dtypes,
    attention: Attention,
    optimizer: Choice | None,
    accumulates: bool,
) -> _Trace:
    with torch.device("meta"):
        model, notes = _build(config, settings, dtypes, attention)
    kinds = [
        {"name": name, "shape": shape, "modules": len(kind.modules), "parameters": kind.parameters}
        for (name, shape), kind in trained_kinds(model).items()
    ]
    with FakeTensorMode():
        _make_fake(model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        memory = TensorMemory(chain(parameters, model.buffers()))
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()  # type: ignore[assignment, unused-ignore]
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
        del hidden, total
        state = peak_of_update = 0
        if optimizer:
            with memory:
                state, peak_of_update, more = _optimizer(optimizer, memory, trained)
            notes += more
        total_number, trained_number = count_parameters(model)
        tensors = sum(_bytes(tensor) for tensor in chain(parameters, model.buffers()))
        spared, passing = _quantized(config, model, dtypes)
        return _Trace(
            parameters=total_number,
            trained=trained_number,
            trained_bytes=sum(_bytes(parameter) for parameter in trained),
            kinds=kinds,
            weights=tensors - spared,
            state=state,
            peak_of_update=peak_of_update,
            activations=activations,
            loss=of_loss - held,
            peak=peak + passing,
            flops=counter.get_total_flops(),
            notes=notes,
        )


def _quantized(config: TrainConfig, model: Any, dtypes: Dtypes) -> tuple[int, int]:
    """Returns the bytes that quantized weights spare, and those of the largest one while it is multiplied."""
    if config.weight_bits is None:
        return 0, 0
    width = _QUANTIZED_BYTES[config.weight_bits]
    if config.weight_bits == 4 and not config.bnb_4bit_use_double_quant:
        width = _SCALES_OF_4_BITS
    head = causal_model(model).get_output_embeddings()
    frozen = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    ]
    spared = sum(_bytes(weight) - int(width * weight.numel()) for weight in frozen)
    return spared, max((weight.numel() * dtypes.compute.itemsize for weight in frozen), default=0)


def _build(
    config: TrainConfig, settings: Any, dtypes: Dtypes, attention: Attention
) -> tuple[Any, list[str]]:
    """Returns the model with its tuner, and what is to be known of what the tuner trains."""
    base = AutoModelForCausalLM.from_config(
        settings,
        dtype=dtypes.weights,
        attn_implementation="eager" if attention.name == "eager" else "sdpa",
        trust_remote_code=config.trust_remote_code,
    )
    base.config.use_cache = False
    base.config.get_text_config()._experts_implementation = _EXPERTS
    # a start that reads the weights takes no memory of its own
    plain = "false" if config.init_weights == "false" else "true"
    notes = [note.split(": ", 1)[1] for note in notes_on_targets(base, config)]
    model = apply_tuner(base, replace(config, init_weights=plain))
    model.train()
    if config.gradient_checkpointing:
        kind = config.gradient_checkpointing_kind
        # the offloading kind needs a GPU, and keeps what the full one keeps
        arguments = checkpointing_arguments("full" if kind == "offload" else kind)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return model, notes


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Runs experts as if all tokens chose the first one: the tensors are as large as in products by groups.

    Args:
        module: The experts of a layer, as Transformers lays them out.
        hidden: `[tokens, width]`.
        chosen: The experts of each token, `[tokens, k]`.
        weights: Their weights, `[tokens, k]`.
    """
    inputs = hidden.repeat_interleave(chosen.shape[1], dim=0)

    def product(values: Tensor, name: str) -> Tensor:
        matrix = getattr(module, name)[0]
        found: Tensor = values @ (matrix if module.is_transposed else matrix.T)
        if module.has_bias:
            found = found + getattr(module, f"{name}_bias")[0]
        return found

    if module.has_gate:
        inner = module._apply_gate(product(inputs, "gate_up_proj"))
    else:
        inner = module.act_fn(product(inputs, "up_proj"))
    found = product(inner, "down_proj") * weights.reshape(-1, 1)
    total: Tensor = found.view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)
    return total


ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts)


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


def _optimizer(
    choice: Choice, memory: TensorMemory, trained: list[nn.Parameter]
) -> tuple[int, int, list[str]]:
    """Returns the bytes of the state of an optimizer and the most at its first step, beside weights and gradients."""
    memory.reset_peak()
    begun = memory.now
    if choice.name.startswith("paged"):
        return 0, 0, [f"{choice.name} keeps its state in the memory of the host"]
    try:
        optimizer = choice.make(trained, **choice.arguments)
        optimizer.step()
    except (
        Exception
    ) as error:  # the kernels of other packages want real tensors, each in its own words
        number = 2 if "8bit" in choice.name else 8
        state = number * sum(parameter.numel() for parameter in trained)
        note = f"{choice.name} is counted as {number} bytes for each trained parameter ({first_line(error)})"
        return state, state, [note]
    state = memory.now - begun
    return state, memory.peak - begun, []


def _autocast(dtypes: Dtypes) -> AbstractContextManager[Any]:
    if dtypes.weights == dtypes.compute:
        return nullcontext()
    # fake tensors stand on the CPU, whatever device the run is for
    return torch.autocast("cpu", dtype=dtypes.compute)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_gpu() -> bool:
    return torch.cuda.is_available()
