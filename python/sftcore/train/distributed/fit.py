"""Which engine lets a model be trained on some GPUs: bytes on each of them, and bytes each of them sends.

In comes what one micro-batch needs on a single device (`Estimate`) and the shape of the model; out comes a line for
each engine. The formulas are those of docs/scaling.md: ZeRO after Rajbhandari et al. 2020 (arXiv:1910.02054), tensor
parallelism after Shoeybi et al. 2019 (arXiv:1909.08053) and Korthikanti et al. 2022 (arXiv:2205.05198), pipelines
after Narayanan et al. 2021 (arXiv:2104.04473), collectives as rings (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

GIB = 2**30
# what CUDA, NCCL and the allocator take of a GPU beside tensors
RESERVED = int(1.5 * GIB)
# of the activations of a layer, the share that tensor parallelism leaves whole (norms, dropout, the residual stream)
_WHOLE_UNDER_TENSOR = 10 / 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """The GPUs of a run.

    Attributes:
        gpus: All of them.
        gpu_bytes: The memory of one.
        gpus_per_node: Those of a node, which are joined faster than nodes are.
        host_bytes: The memory of a node; None where it is not known.
    """

    gpus: int
    gpu_bytes: int
    gpus_per_node: int
    host_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a model and a micro-batch need on one device, in bytes, and what decides how they can be split.

    Attributes:
        weights: All parameters and buffers.
        gradients: Those of trained parameters.
        optimizer: The state of the optimizer.
        kept: Activations that wait for the backward pass.
        passing: The most beyond all of the above at any time.
        unit: The largest part whose weights are gathered at once: a layer, or the embedding.
        stream: The hidden states of a micro-batch between two layers.
        layers: Decoder layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        micro_batches: Of an optimizer step on each share of the data.
        checkpoints: Whether activations are computed again.
        has_tensor_plan: Whether Transformers has a tensor-parallel plan for the model.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    passing: int
    unit: int
    stream: int
    layers: int
    heads: int
    kv_heads: int
    micro_batches: int
    checkpoints: bool
    has_tensor_plan: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How an engine would run.

    Attributes:
        engine: Its name.
        flags: What to pass.
        state: Weights, gradients and optimizer on one GPU.
        activations: All that comes and goes with a micro-batch on one GPU.
        host: Bytes of a node's own memory.
        traffic: Bytes that a GPU sends in an optimizer step.
        obstacle: Why it cannot run whatever the memory; None where it can.
        remark: What to know of it.
        fits: Whether it runs.
    """

    engine: str
    flags: str
    state: int = 0
    activations: int = 0
    host: int = 0
    traffic: int = 0
    obstacle: str | None = None
    remark: str = ""
    fits: bool = False

    @property
    def peak(self) -> int:
        """Bytes of tensors on one GPU."""
        return self.state + self.activations


def find_fits(needs: Needs, machines: Machines) -> list[Fit]:
    """Returns every engine, in the order in which one would try them: the simplest and quietest first."""
    fits = []
    for fit in _engines(needs, machines):
        room = machines.gpu_bytes - RESERVED
        host_room = machines.host_bytes
        is_held = fit.peak <= room and (host_room is None or fit.host <= host_room)
        fits.append(replace(fit, fits=fit.obstacle is None and is_held))
    return fits


def choose_fit(fits: list[Fit]) -> Fit | None:
    """Returns the first that fits."""
    return next((fit for fit in fits if fit.fits), None)


def _engines(needs: Needs, machines: Machines) -> Iterator[Fit]:
    n, k = machines.gpus, needs.micro_batches
    w, g, o = needs.weights, needs.gradients, needs.optimizer
    a = needs.kept + needs.passing
    ring = (n - 1) / n
    gathered = 2 * needs.unit  # one in use, one on its way
    on_node = min(n, machines.gpus_per_node)
    if n == 1:
        yield Fit(engine="one GPU", flags="", state=w + g + o, activations=a)
    else:
        yield Fit(engine="DDP", flags="", state=w + g + o, activations=a, traffic=int(2 * g * ring))
        yield Fit(
            engine="ZeRO-1",
            flags="--deepspeed zero1",
            state=w + g + o // n,
            activations=a,
            traffic=int(2 * g * ring),
        )
        yield Fit(
            engine="ZeRO-2",
            flags="--deepspeed zero2",
            state=w + (g + o) // n,
            activations=a + needs.unit,
            # gradients are scattered after each micro-batch, updated parameters are gathered once
            traffic=int((k + 1) * g * ring),
        )
        whole = _gathers(needs, k)
        yield Fit(
            engine="FSDP2",
            flags="--fsdp fsdp2",
            state=(w + g + o) // n,
            activations=a + gathered,
            traffic=int(whole * ring),
        )
        if n > on_node:
            inner = (on_node - 1) / on_node
            nodes = n // on_node
            yield Fit(
                engine="FSDP2, hybrid",
                flags="--fsdp hybrid_shard",
                state=(w + g + o) // on_node,
                activations=a + gathered,
                traffic=int(whole * inner + 2 * g / on_node * (nodes - 1) / nodes),
                remark=f"of it {_gib(2 * g / on_node * (nodes - 1) / nodes)} between nodes",
            )
        yield Fit(
            engine="ZeRO-3",
            flags="--deepspeed zero3",
            state=(w + g + o) // n,
            activations=a + gathered,
            traffic=int(whole * ring),
        )
        yield from _splits(needs, machines)
    yield Fit(
        engine="ZeRO-2, offload",
        flags="--deepspeed zero2_offload",
        state=w + g // n,
        activations=a + needs.unit,
        host=(o + g) * on_node // n,
        traffic=int((k + 1) * g * ring),
        remark="the update runs on the host: slow",
    )
    yield Fit(
        engine="ZeRO-3, offload",
        flags="--deepspeed zero3_offload",
        activations=a + gathered,
        host=(w + o + g) * on_node // n,
        traffic=int(_gathers(needs, k) * ring),
        remark="weights come from the host layer by layer: slowest",
    )
    if n > 1:
        yield Fit(
            engine="device_map",
            flags="--device_map auto",
            state=(w + g + o) // n + needs.unit,
            activations=a,
            remark=f"one process, GPUs take turns: 1/{n} of the speed",
        )


def _gathers(needs: Needs, micro_batches: int) -> int:
    """Returns the bytes of a step where weights are gathered for each pass and gradients scattered after it."""
    return micro_batches * (2 * needs.weights + needs.gradients)


def _splits(needs: Needs, machines: Machines) -> Iterator[Fit]:
    """Yields tensor, pipeline and sequence parallelism, each over as many GPUs as it takes well."""
    n, k = machines.gpus, needs.micro_batches
    w, g, o = needs.weights, needs.gradients, needs.optimizer
    on_node = min(n, machines.gpus_per_node)
    t = math.gcd(on_node, needs.heads, needs.kv_heads)
    whole_share = 1.0 if needs.checkpoints else _WHOLE_UNDER_TENSOR
    kept = needs.kept * (whole_share + (1 - whole_share) / t)
    obstacle = None
    if not needs.has_tensor_plan:
        obstacle = "Transformers has no tensor-parallel plan for this model"
    elif t == 1:
        obstacle = (
            f"{needs.heads} heads and {needs.kv_heads} of keys do not divide over GPUs of a node"
        )
    passes = 3 if needs.checkpoints else 2
    t = t if t > 1 else on_node
    yield Fit(
        engine=f"tensor {t}",
        flags=f"--tensor_parallel_size {t}",
        state=(w + g + o) // t,
        activations=int(kept + needs.passing / t),
        # two sums of the stream a layer and pass, then the gradients over the shares of the data
        traffic=int(
            k * needs.layers * passes * 2 * 2 * needs.stream * (t - 1) / t
            + 2 * g / t * (1 - t / n if n > t else 0)
        ),
        obstacle=obstacle,
    )
    p = on_node
    obstacle = f"{needs.layers} layers do not make {p} stages" if needs.layers < p else None
    in_flight = min(p, k)
    idle = (p - 1) / (k + p - 1)
    yield Fit(
        engine=f"pipeline {p}",
        flags=f"--pipeline_parallel_size {p}",
        state=(w + g + o) // p + needs.unit,
        activations=int(needs.kept * in_flight / p + needs.passing),
        traffic=int(2 * k * needs.stream),
        obstacle=obstacle,
        remark=f"idle {idle:.0%} of the time with {k} micro-batches a step",
    )
    u = math.gcd(on_node, needs.heads, needs.kv_heads)
    obstacle = None
    if u == 1:
        u = on_node
        obstacle = (
            f"{needs.heads} heads and {needs.kv_heads} of keys do not divide over GPUs of a node"
        )
    yield Fit(
        engine=f"sequence {u} on ZeRO-3",
        flags=f"--deepspeed zero3 --sequence_parallel_size {u}",
        state=(w + g + o) // n,
        activations=(needs.kept + needs.passing) // u + 2 * needs.unit,
        traffic=int(
            _gathers(needs, k) * (n - 1) / n
            + k * needs.layers * passes * 4 * needs.stream / u * (u - 1) / u
        ),
        obstacle=obstacle,
        remark="for sequences that are too long for one GPU",
    )


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB"
