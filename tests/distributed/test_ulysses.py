"""Ranks that share sequences learn what one process learns from whole ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from processes import ids_of_steps, run_named
from saved_models import logits_of, weights_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"tuner_type": "full", "per_device_train_batch_size": 2},
    "packed": {"tuner_type": "full", "packing": True, "max_length": 255},
    "free": {"tuner_type": "lora", "padding_free": True, "per_device_train_batch_size": 2},
    "checkpointed": {
        "tuner_type": "lora",
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 2,
        "loss_impl": "plain",
    },
}
SHARED = {"gradient_accumulation_steps": 2, "split_dataset_ratio": 0.1, "max_grad_norm": 0.2}
ANSWERED = {"predict_with_generate": True, "predict_rows": 2, "max_new_tokens": 4}
Found = dict[str, dict[str, Any]]


def run_shared(count: int, runs: Found, folder: Path, model: Path, rows: Path) -> Found:
    """Trains with the settings that all runs have, and with their own."""
    whole = {name: {**SHARED, **given} for name, given in runs.items()}
    return run_named(count, whole, folder, model, rows)


@pytest.fixture(scope="module")
def alone(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    runs = {name: dict(settings) for name, settings in LAYOUTS.items()}
    runs["padded"] |= ANSWERED
    return run_shared(1, runs, tmp_path_factory.mktemp("whole"), model, rows)


@pytest.fixture(scope="module")
def pair(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two processes that share each sequence."""
    folder = tmp_path_factory.mktemp("pair")
    runs = {name: {"sequence_parallel_size": 2, **values} for name, values in LAYOUTS.items()}
    runs["padded"] |= {**ANSWERED, "save_steps": 4, "eval_steps": 4, "save_total_limit": 0}
    at = {"resume_from_checkpoint": str(folder / "padded" / "checkpoint-4")}
    runs["resumed"] = {**runs["padded"], **at}
    if HAS_DEEPSPEED:
        runs["zero2"] = {**runs["packed"], "deepspeed": "zero2"}
        runs["zero3"] = {**runs["checkpointed"], "deepspeed": "zero3"}
    return run_shared(2, runs, folder, model, rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_sequences_give_the_losses_of_whole_ones(
    alone: Found, pair: Found, name: str
) -> None:
    same(alone[name], pair[name])


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs the package deepspeed")
@pytest.mark.parametrize(("name", "layout"), [("zero2", "packed"), ("zero3", "checkpointed")])
def test_they_do_so_on_zero(alone: Found, pair: Found, name: str, layout: str) -> None:
    same(alone[layout], pair[name])


def same(one: dict[str, Any], many: dict[str, Any]) -> None:
    assert len(many["losses"]) == 10
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert many["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-3)
    assert many["eval_losses"][-1] == pytest.approx(one["eval_losses"][-1], abs=1e-4)
    assert ids_of_steps(Path(one["output_dir"])) == ids_of_steps(Path(many["output_dir"]))
    assert one["losses"][-1] < one["losses"][0]


def test_the_saved_weights_and_answers_are_those_of_one_process(
    alone: Found, pair: Found, model: Path
) -> None:
    for name in ("packed", "free"):
        one, many = (Path(found[name]["last"]) for found in (alone, pair))
        assert weights_of(one).keys() == weights_of(many).keys()
        expected = logits_of(one, model)
        assert (logits_of(many, model) - expected).abs().max() < 1e-3
        assert (logits_of(model, model) - expected).abs().max() > 1e-2
    answers = [
        (Path(found["padded"]["output_dir"]) / "predictions" / "step-10.jsonl").read_text()
        for found in (alone, pair)
    ]
    assert answers[0] == answers[1]


def test_a_resumed_run_is_the_uninterrupted_one(pair: Found) -> None:
    assert pair["resumed"]["losses"] == pair["padded"]["losses"]
    assert pair["resumed"]["eval_losses"] == pair["padded"]["eval_losses"]


def test_groups_of_ranks_split_the_data_among_them(
    alone: Found, model: Path, rows: Path, tmp_path: Path
) -> None:
    shares = {"sequence_parallel_size": 2, "gradient_accumulation_steps": 1}
    runs = {
        "padded": {**LAYOUTS["padded"], **shares},
        "packed": {**LAYOUTS["packed"], **shares},
        "heads": {**LAYOUTS["padded"], "sequence_parallel_size": 4},
    }
    found = run_shared(4, runs, tmp_path, model, rows)
    same(alone["padded"], found["padded"])
    same(alone["packed"], found["packed"])
    assert found["heads"]["error"] == (
        "ConfigError: --sequence_parallel_size 4 does not divide the 4 heads and 2 key-value heads of this model; "
        "expected one of 1, 2"
    )
