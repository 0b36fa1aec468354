"""From settings and GPUs to the engines that would run them, as `sftcore plan` prints it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError, SftcoreError
from sftcore.models import load_settings, resolve_model
from sftcore.models.attention import Attention
from sftcore.models.dtypes import Dtypes
from sftcore.train.distributed.fit import GIB, RESERVED, Fit, Machines, Needs, choose_fit, find_fits
from sftcore.train.estimate import BatchSize, Estimate, estimate_step
from sftcore.train.optimizers import choose_optimizer

_GPUS = re.compile(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", re.IGNORECASE)
# gigabytes of GPUs by name; those that come in several sizes are named with it
_NAMED = {
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "l40s": 48,
    "l4": 24,
    "t4": 16,
    "4090": 24,
    "3090": 24,
    "5090": 32,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What `sftcore plan` found.

    Attributes:
        estimate: What one device alone would need.
        fits: All engines.
        chosen: The one to take; None where none fits.
        text: All of it, for people.
    """

    estimate: Estimate
    fits: list[Fit]
    chosen: Fit | None
    text: str


def read_machines(gpus: str, gpus_per_node: int = 8, host: float | None = None) -> Machines:
    """Returns the GPUs that a text like `8x80G` or `4xH100` names.

    Raises:
        ConfigError: It names none.
    """
    count, mark, name = gpus.lower().rpartition("x")
    if name in _NAMED and (not mark or count.strip().isdecimal()):
        number, size = int(count) if mark else 1, float(_NAMED[name])
    else:
        found = _GPUS.fullmatch(gpus.strip())
        if found is None:
            raise ConfigError(
                f"--gpus {gpus} names no GPUs; expected their number and memory, like 8x80G, or a name: "
                f"{', '.join(_NAMED)}"
            )
        number, size = int(found[1] or 1), float(found[2])
    if not number or not size or gpus_per_node < 1:
        raise ConfigError(f"--gpus {gpus}: expected at least one GPU with memory")
    return Machines(
        gpus=number,
        gpu_bytes=int(size * GIB),
        gpus_per_node=min(gpus_per_node, number),
        host_bytes=None if host is None else int(host * GIB),
    )


def find_needs(config: TrainConfig, machines: Machines) -> tuple[Needs, Estimate]:
    """Returns what the settings need on one GPU.

    Args:
        config: The settings; batches are taken to be as long as `max_length` allows.
        machines: The GPUs, whose number decides the micro-batches of a step.

    Raises:
        SftcoreError: The model cannot be counted without its weights.
    """
    folder = resolve_model(config.model, weights=False)
    settings = load_settings(folder, trust_remote_code=config.trust_remote_code)
    dtypes = _dtypes(config)
    width = config.packing_length or config.max_length
    rows = 1 if config.tokens_per_batch else config.per_device_train_batch_size
    size = BatchSize(
        rows=rows,
        width=config.tokens_per_batch or width,
        trained_tokens=rows * (config.tokens_per_batch or width),
    )
    micro_batches = config.accumulation_steps(machines.gpus)
    try:
        estimate = estimate_step(
            config,
            settings,
            size,
            dtypes=dtypes,
            attention=Attention(name="flash_attention_2", reason="taken for granted"),
            optimizer=choose_optimizer(config),
            accumulates=micro_batches > 1,
        )
    except NotImplementedError as error:
        raise SftcoreError(
            f"{config.model} cannot be counted without its weights ({error}); try the run itself with --test_oom"
        ) from error
    text = settings.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.trust_remote_code
        )
    width_of_weight = dtypes.compute.itemsize
    layers = [module for name, module in model.named_modules() if re.search(r"\.layers\.0$", name)]
    parts = [*layers, model.get_input_embeddings()]
    unit = max(sum(p.numel() for p in part.parameters()) for part in parts) * width_of_weight
    state = estimate.weights + estimate.gradients + estimate.optimizer
    beyond = max(estimate.peak - state, estimate.activations)
    heads = int(getattr(text, "num_attention_heads", 1))
    needs = Needs(
        weights=estimate.weights,
        gradients=estimate.gradients,
        optimizer=estimate.optimizer,
        kept=estimate.activations,
        passing=beyond - estimate.activations,
        unit=unit,
        stream=size.rows * size.width * int(text.hidden_size) * dtypes.compute.itemsize,
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        micro_batches=micro_batches,
        checkpoints=config.gradient_checkpointing,
        has_tensor_plan=bool(getattr(settings, "base_model_tp_plan", None)),
    )
    return needs, estimate


def _dtypes(config: TrainConfig) -> Dtypes:
    """Returns the dtypes of a run on a GPU that has bfloat16, whatever this machine has."""
    if config.torch_dtype == "auto":
        weights = torch.float32 if config.trains_weights else torch.bfloat16
        return Dtypes(weights=weights, compute=torch.bfloat16)
    dtype: torch.dtype = getattr(torch, config.torch_dtype)
    return Dtypes(weights=dtype, compute=dtype)


def plan(config: TrainConfig, machines: Machines) -> Answer:
    """Finds the engines that let `config` run on `machines`, and the first to try."""
    needs, estimate = find_needs(config, machines)
    fits = find_fits(needs, machines)
    chosen = choose_fit(fits)
    lines = [*_head(config, machines, needs, estimate), "", *_table(fits), ""]
    if chosen:
        start = f"NPROC_PER_NODE={machines.gpus_per_node} " if machines.gpus > 1 else ""
        if "device_map" in chosen.flags:
            start = ""
        flags = f" {chosen.flags}" if chosen.flags else ""
        lines.append(f"take {chosen.engine}: {start}sftcore train ...{flags}")
        nodes = -(-machines.gpus // machines.gpus_per_node)
        if nodes > 1:
            lines.append(
                f"on {nodes} nodes, with NNODES={nodes} NODE_RANK=0.. MASTER_ADDR=<node 0> before it"
            )
    else:
        lines.append(
            "none fits: lower --per_device_train_batch_size or --max_length, take --tuner_type lora"
            + ("" if config.weight_bits else " or --quant_bits 4")
            + (
                ", or more GPUs"
                if config.gradient_checkpointing
                else ", --gradient_checkpointing true, or more GPUs"
            )
        )
    return Answer(estimate=estimate, fits=fits, chosen=chosen, text="\n".join(lines))


def _head(config: TrainConfig, machines: Machines, needs: Needs, estimate: Estimate) -> list[str]:
    width = config.tokens_per_batch or config.packing_length or config.max_length
    rows = 1 if config.tokens_per_batch else config.per_device_train_batch_size
    nodes = -(-machines.gpus // machines.gpus_per_node)
    return [
        f"model        {config.model}: {estimate.parameters:,} parameters, {estimate.trained_parameters:,} trained "
        f"({config.tuner_type}, {config.optim})",
        f"GPUs         {machines.gpus} of {machines.gpu_bytes / GIB:.0f} GiB on {nodes} "
        f"{'node' if nodes == 1 else 'nodes'}; {RESERVED / GIB:.1f} GiB of each are left to CUDA",
        f"micro-batch  {rows} x {width:,} tokens, {needs.micro_batches} a step on each GPU, all places filled",
        f"one device   {_gib(estimate.peak)}: weights {_gib(needs.weights)}, gradients {_gib(needs.gradients)}, "
        f"optimizer {_gib(needs.optimizer)}, activations {_gib(needs.kept + needs.passing)}",
    ]


def _table(fits: list[Fit]) -> list[str]:
    rows = [("engine", "fits", "GiB a GPU", "state", "activations", "host", "sent a step", "")]
    for fit in fits:
        verdict = "yes" if fit.fits else "no"
        if fit.obstacle:
            rows.append((fit.engine, verdict, "", "", "", "", "", fit.obstacle))
            continue
        rows.append(
            (
                fit.engine,
                verdict,
                _number(fit.peak),
                _number(fit.state),
                _number(fit.activations),
                _number(fit.host) if fit.host else "",
                _number(fit.traffic) if fit.traffic else "",
                fit.remark,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row[:7], widths, strict=True))
        ]
        # an obstacle stands in place of the numbers
        cells = cells if any(row[2:7]) else cells[:2]
        lines.append("  ".join([*cells, row[7]]).rstrip())
    return lines


def _number(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _gib(size: float) -> str:
    return f"{_number(size)} GiB"


def to_json(answer: Answer) -> dict[str, Any]:
    """Returns the answer as values for a file."""
    return {
        "chosen": answer.chosen.engine if answer.chosen else None,
        "engines": [
            {
                "engine": fit.engine,
                "flags": fit.flags,
                "fits": fit.fits,
                "peak": fit.peak,
                "state": fit.state,
                "activations": fit.activations,
                "host": fit.host,
                "traffic": fit.traffic,
                "obstacle": fit.obstacle,
            }
            for fit in answer.fits
        ],
    }
