"""Data parallelism: any number of processes sees the same examples in each step and learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from processes import ids_of_steps, run_processes, settings_of
from saved_models import logits_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TUNERS: dict[str, dict[str, Any]] = {
    "full": {"tuner_type": "full", "save_steps": 5, "save_total_limit": 0},
    "lora": {"tuner_type": "lora", "gradient_checkpointing": True},
    "packed": {"tuner_type": "full", "packing": True, "max_length": 256},
}


def runs_of(count: int, model: Path, rows: Path, folder: Path) -> list[dict[str, Any]]:
    return [
        settings_of(
            model,
            rows,
            folder / f"{name}-{count}",
            gradient_accumulation_steps=4 // count,
            split_dataset_ratio=0.1,
            **settings,
        )
        for name, settings in TUNERS.items()
    ]


@pytest.fixture(scope="module")
def found(
    model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[list[dict[str, Any]]]]:
    """Of 1, 2 and 4 processes: what each rank found of each run; of 2 also what goes on from a checkpoint of 1."""
    folder = tmp_path_factory.mktemp("ddp")
    runs = {count: runs_of(count, model, rows, folder) for count in (1, 2, 4)}
    goes_on = {
        "resume_from_checkpoint": str(folder / "full-1" / "checkpoint-5"),
        "output_dir": str(folder / "gone-on"),
    }
    runs[2].append({**runs[2][0], **goes_on})
    return {count: run_processes(count, runs[count], folder / str(count)) for count in runs}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", TUNERS)
def test_losses_do_not_depend_on_the_number_of_processes(
    found: dict[int, Any], name: str, count: int
) -> None:
    place = list(TUNERS).index(name)
    one, many = found[1][0][place], found[count][0][place]
    assert len(one["losses"]) == 10
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert many["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-3)
    assert many["eval_losses"] == pytest.approx(one["eval_losses"], abs=1e-4)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize("name", TUNERS)
def test_each_step_sees_the_same_examples_on_any_number_of_processes(
    found: dict[int, Any], name: str
) -> None:
    place = list(TUNERS).index(name)
    ledgers = [ids_of_steps(Path(ranks[0][place]["output_dir"])) for ranks in found.values()]
    assert len(ledgers[0]) == 10
    assert ledgers[0] == ledgers[1] == ledgers[2]


@pytest.mark.parametrize("name", TUNERS)
def test_what_was_saved_loads_in_plain_libraries_and_says_what_a_single_process_says(
    found: dict[int, Any], model: Path, name: str
) -> None:
    place = list(TUNERS).index(name)
    one, two, four = (Path(ranks[0][place]["last"]) for ranks in found.values())
    alone, unchanged = logits_of(one, model), logits_of(model, model)
    assert (logits_of(two, model) - alone).abs().max() < 1e-3
    assert (logits_of(four, model) - alone).abs().max() < 1e-3
    assert (alone - unchanged).abs().max() > 1e-2


def test_two_processes_go_on_from_the_checkpoint_of_one(found: dict[int, Any]) -> None:
    one, gone_on = found[1][0][0], found[2][0][len(TUNERS)]
    assert gone_on["steps"][-5:] == [6, 7, 8, 9, 10]
    assert gone_on["losses"][-5:] == pytest.approx(one["losses"][5:], abs=1e-4)
    assert gone_on["grad_norms"][-5:] == pytest.approx(one["grad_norms"][5:], rel=1e-3)
