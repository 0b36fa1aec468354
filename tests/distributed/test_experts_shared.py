"""Experts with an adapter on several processes: engines that learn what one process learns, and those that refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experts import make_moe
from processes import run_alone, run_processes, settings_of
from saved_models import logits_of
from tiny_runs import make_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, recomputed": {"gradient_checkpointing": True},
    "fsdp2": {"fsdp": "fsdp2"},
    "fsdp2, recomputed": {"fsdp": "fsdp2", "gradient_checkpointing": True},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "ulysses": {"sequence_parallel_size": 2, "gradient_accumulation_steps": 4},
}
REFUSED: dict[str, dict[str, Any]] = {
    "--tensor_parallel_size cannot": {"tensor_parallel_size": 2},
    "--pipeline_parallel_size splits": {"pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module")
def moe(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    return make_moe("glm4_moe", folder, shared_data / "tokenizers" / "minimind")


@pytest.fixture(scope="module")
def found(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds, and what the first of two finds with each engine."""
    folder = tmp_path_factory.mktemp("runs")
    rows = make_rows(folder / "rows.jsonl", 16)
    lora = {"tuner_type": "lora", "lora_rank": 4, "max_steps": 4, "template": "chatml"}
    alone = run_alone([settings_of(moe, rows, folder / "one", **lora)], folder / "alone")[0]
    engines = {**ENGINES, **REFUSED}
    runs = [
        settings_of(moe, rows, folder / str(n), **{"gradient_accumulation_steps": 2, **lora, **own})
        for n, own in enumerate(engines.values())
    ]
    found = {"one": alone}
    for kind, chosen in (
        ("zero", [name for name in engines if name.startswith("zero")]),
        ("torch", [name for name in engines if not name.startswith("zero")]),
    ):
        listed = [run for name, run in zip(engines, runs, strict=True) if name in chosen]
        found |= dict(zip(chosen, run_processes(2, listed, folder / kind)[0], strict=True))
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_learn_what_one_learns(found: dict[str, Any], moe: Path, name: str) -> None:
    one, two = found["one"], found[name]
    assert "error" not in two, two
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-3)
    expected, saved = (logits_of(Path(run["last"]), moe) for run in (one, two))
    assert (expected - saved).abs().max() < 2e-3 * expected.std()


@pytest.mark.parametrize("words", REFUSED)
def test_an_engine_that_cannot_refuses_by_name(found: dict[str, Any], words: str) -> None:
    assert words in found[words]["error"]
