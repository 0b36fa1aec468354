"""Which engine fits which GPUs: the formulas, the order, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from sftcore.cli import main
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.distributed.fit import GIB, RESERVED, Needs, choose_fit, find_fits
from sftcore.train.distributed.plan import find_needs, read_machines

# 8 billion parameters trained in float32 with AdamW: 16 bytes each
FULL_8B = Needs(
    weights=32 * GIB,
    gradients=32 * GIB,
    optimizer=64 * GIB,
    kept=2 * GIB,
    passing=2 * GIB,
    unit=1 * GIB,
    stream=16 * 2**20,
    layers=32,
    heads=32,
    kv_heads=8,
    micro_batches=4,
    checkpoints=True,
    has_tensor_plan=True,
)
LORA_8B = replace(FULL_8B, weights=16 * GIB, gradients=2**25, optimizer=2**26)


def by_name(needs: Needs, gpus: str, **more: Any) -> dict[str, Any]:
    return {fit.engine: fit for fit in find_fits(needs, read_machines(gpus, **more))}


def test_zero_divides_optimizer_then_gradients_then_weights() -> None:
    fits = by_name(FULL_8B, "8x80G")
    assert fits["DDP"].state == 128 * GIB
    assert fits["ZeRO-1"].state == (64 + 64 // 8) * GIB
    assert fits["ZeRO-2"].state == (32 + 96 // 8) * GIB
    assert fits["ZeRO-3"].state == fits["FSDP2"].state == 128 // 8 * GIB
    assert fits["ZeRO-3, offload"].state == 0
    assert fits["ZeRO-3, offload"].host == 128 * GIB


def test_a_ring_sends_twice_the_gradients_less_a_share() -> None:
    fits = by_name(FULL_8B, "8x80G")
    assert fits["DDP"].traffic == fits["ZeRO-1"].traffic == 2 * 32 * GIB * 7 // 8
    # four micro-batches gather the weights for two passes each, and scatter gradients
    assert fits["ZeRO-3"].traffic == 4 * 3 * 32 * GIB * 7 // 8


def test_the_first_that_fits_is_the_simplest() -> None:
    def chosen(needs: Needs, gpus: str, **more: Any) -> str | None:
        fit = choose_fit(find_fits(needs, read_machines(gpus, **more)))
        return fit.engine if fit else None

    assert chosen(LORA_8B, "1x24G") == "one GPU"
    assert chosen(LORA_8B, "8x80G") == "DDP"
    assert chosen(FULL_8B, "8x80G") == "ZeRO-1"
    assert chosen(FULL_8B, "8x64G") == "ZeRO-2"
    assert chosen(FULL_8B, "8x40G") == "FSDP2"
    assert chosen(FULL_8B, "2x24G") == "ZeRO-3, offload"
    assert chosen(FULL_8B, "2x24G", host=64) is None


def test_what_cannot_be_split_is_no_fit_whatever_the_memory() -> None:
    odd = replace(FULL_8B, heads=9, kv_heads=3, layers=4, has_tensor_plan=True)
    fits = by_name(odd, "8x1000G")
    assert fits["tensor 8"].obstacle == "9 heads and 3 of keys do not divide over GPUs of a node"
    assert fits["pipeline 8"].obstacle == "4 layers do not make 8 stages"
    assert not fits["tensor 8"].fits
    unplanned = by_name(replace(FULL_8B, has_tensor_plan=False), "8x1000G")
    assert "no tensor-parallel plan" in unplanned["tensor 8"].obstacle


def test_a_gpu_keeps_some_memory_for_itself() -> None:
    edge = replace(LORA_8B, kept=0, passing=0)
    state = edge.weights + edge.gradients + edge.optimizer
    assert by_name(edge, f"1x{(state + RESERVED) / GIB}G")["one GPU"].fits
    assert not by_name(edge, f"1x{(state + RESERVED) / GIB - 0.01}G")["one GPU"].fits


@pytest.mark.parametrize("text", ["", "8x", "x80", "eight", "0x80G", "8x80T"])
def test_gpus_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        read_machines(text)


def test_gpus_are_known_by_name_and_by_size() -> None:
    assert read_machines("4xH100").gpu_bytes == 80 * GIB
    assert read_machines("24gb").gpus == 1
    assert read_machines("16x80G").gpus_per_node == 8


def test_needs_are_those_of_the_model(model: Path) -> None:
    settings = {"model": str(model), "dataset": ["any"], "max_length": 128, "tuner_type": "full"}
    needs, estimate = find_needs(TrainConfig(**settings), read_machines("2x24G"))
    assert needs.weights >= 4 * estimate.parameters
    assert needs.gradients == 4 * estimate.parameters
    assert needs.optimizer >= 8 * estimate.parameters
    # the embedding is the largest part, gathered in bfloat16
    assert needs.unit == 49152 * 32 * 2
    assert (needs.layers, needs.heads, needs.kv_heads) == (2, 4, 2)
    assert needs.micro_batches == 8


def test_the_command_says_what_to_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(model), "--gpus", "4x24G", "--max_length", "128"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "take DDP: NPROC_PER_NODE=4 sftcore train ..." in text
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["chosen"] == "DDP"
    assert {engine["engine"] for engine in values["engines"]} >= {"ZeRO-3", "FSDP2", "tensor 2"}
