"""FSDP2: parts of the parameters on each process, the same numbers as one process, and whole checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import run_alone, run_processes, settings_of, start
from saved_models import logits_of, weights_of
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LORA = {"tuner_type": "lora", "lora_rank": 4, "target_modules": ["all-linear"]}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"max_grad_norm": 0.5, "weight_decay": 0.1, "save_steps": 5, "eval_steps": 5},
    "lora": {**LORA, "gradient_checkpointing": True, "max_grad_norm": 0.05, "save_steps": 5},
    "packed": {"packing": True, "max_length": 256, "test_oom": True},
    "shards": {
        **LORA,
        "save_steps": 5,
        "fsdp_config": "state_dict_type=sharded",
        "predict_with_generate": True,
        "predict_rows": 3,
        "max_new_tokens": 4,
    },
    "sora": {
        "tuner_type": "sora",
        "lora_rank": 4,
        "sora_lambda": 1.0,
        "sora_lr": 0.05,
        "loss_impl": "plain",
        "gradient_checkpointing": True,
    },
}
"""Each is run by one process and by two; a step has four examples either way."""


def settings(
    model: Path, rows: Path, folder: Path, name: str, count: int, **more: Any
) -> dict[str, Any]:
    given = {"gradient_accumulation_steps": 4 // count, "split_dataset_ratio": 0.1, **RUNS[name]}
    return settings_of(model, rows, folder / f"{name}-{count}", **{**given, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def one(model: Path, rows: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What one process finds."""
    runs = [settings(model, rows, folder, name, 1) for name in RUNS]
    for run in runs:
        run.pop("fsdp_config", None)
    found = run_alone(runs, folder / "one")
    return dict(zip(RUNS, found, strict=True))


@pytest.fixture(scope="module")
def two(
    model: Path, rows: Path, folder: Path, one: dict[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes finds."""
    kinds = {"packed": "shard_grad_op"}
    runs = [settings(model, rows, folder, name, 2, fsdp=kinds.get(name, "fsdp2")) for name in RUNS]
    middle = {
        "on": (folder / "full-2" / "checkpoint-5", {"fsdp": "full_shard"}),
        "from_one": (Path(one["full"]["output_dir"]) / "checkpoint-5", {"fsdp": "fsdp2"}),
        "to_plain": (folder / "full-2" / "checkpoint-5", {}),
        "lora_on": (folder / "lora-2" / "checkpoint-5", {"fsdp": "fsdp2"}),
        "shards_on": (folder / "shards-2" / "checkpoint-5", {"fsdp": "fsdp2"}),
    }
    for name, (checkpoint, engine) in middle.items():
        kind = name.removesuffix("_on") if name.endswith("_on") else "full"
        run = settings(model, rows, folder, kind, 2, **engine)
        output = str(folder / name)
        runs.append({**run, "resume_from_checkpoint": str(checkpoint), "output_dir": output})
    refused = {
        "optim": {"optim": "muon", "fsdp": "fsdp2"},
        "adalora": {"tuner_type": "adalora", "fsdp": "fsdp2"},
        "hybrid": {"fsdp": "hybrid_shard"},
        "exploding": {"learning_rate": 1e30, "fsdp": "fsdp2"},
    }
    runs += [settings_of(model, rows, folder / "refused", **given) for given in refused.values()]
    ranks = run_processes(2, runs, folder / "two")
    names = [*RUNS, *middle, *refused]
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(names)}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_parts_of_the_weights_learn_what_one_learns(
    one: dict[str, Any], two: dict[str, Any], name: str
) -> None:
    expected, found = one[name], two[name][0]
    assert "error" not in found, found
    assert len(expected["losses"]) == 10
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
    assert found["eval_losses"] == pytest.approx(expected["eval_losses"], abs=1e-4)
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("name", ["full", "lora", "sora"])
def test_what_was_saved_is_whole_and_loads_in_plain_libraries(
    one: dict[str, Any], two: dict[str, Any], name: str, model: Path
) -> None:
    first, second = (Path(found["last"]) for found in (one[name], two[name][0]))
    expected, found = weights_of(first), weights_of(second)
    assert {key: value.shape for key, value in expected.items()} == {
        key: value.shape for key, value in found.items()
    }
    distance = (logits_of(first, model) - logits_of(second, model)).abs().max()
    assert distance < 2e-3
    assert (logits_of(second, model) - logits_of(model, model)).abs().max() > 0.05


def test_each_process_has_half_of_weights_gradients_and_optimizer(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    whole = one["full"]["bytes"]
    assert whole["optimizer"] == 2 * whole["parameters"]
    for rank in two["full"]:
        for kind, size in whole.items():
            # each dimension of this model is even
            assert rank["bytes"][kind] == size // 2, kind


@pytest.mark.parametrize("name", ["on", "from_one", "to_plain"])
def test_a_run_goes_on_from_the_checkpoint_of_another_engine_or_number_of_processes(
    one: dict[str, Any], two: dict[str, Any], name: str
) -> None:
    found = two[name][0]
    assert "error" not in found, found
    assert found["steps"][-5:] == [6, 7, 8, 9, 10]
    tolerance = 1e-6 if name == "on" else 1e-4
    whole = two["full"][0] if name == "on" else one["full"]
    assert found["losses"][-5:] == pytest.approx(whole["losses"][5:], abs=tolerance)
    assert found["grad_norms"][-5:] == pytest.approx(whole["grad_norms"][5:], rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "shards"])
def test_a_lora_goes_on_from_its_checkpoint(two: dict[str, Any], name: str) -> None:
    found = two[f"{name}_on"][0]
    assert "error" not in found, found
    assert found["losses"][-5:] == pytest.approx(two[name][0]["losses"][5:], abs=1e-6)


def test_the_best_checkpoint_is_that_of_one_process(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    names = {Path(found["best"]).name for found in (one["full"], *two["full"])}
    assert len(names) == 1


def test_generated_answers_are_those_of_one_process(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    def lines(found: dict[str, Any]) -> list[Any]:
        file = Path(found["output_dir"]) / "predictions" / "step-10.jsonl"
        return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]

    assert len(lines(one["shards"])) == 3
    assert lines(one["shards"]) == lines(two["shards"][0])


def test_a_loss_that_is_not_finite_ends_the_run_on_every_process(two: dict[str, Any]) -> None:
    for rank in two["exploding"]:
        assert "NonFiniteError" in rank["error"]
        assert "no row causes it alone" in rank["error"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optim", "adamw_torch"),
        ("adalora", "lora or sora"),
        ("hybrid", "shard_size"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_can(
    two: dict[str, Any], name: str, words: str
) -> None:
    for rank in two[name]:
        assert "ConfigError" in rank["error"]
        assert words in rank["error"]


def test_two_copies_of_two_parts_learn_what_one_process_learns(
    model: Path, rows: Path, folder: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    more = {"fsdp": "hybrid_shard", "fsdp_config": "shard_size=2"}
    run = settings(model, rows, folder, "full", 4, **more)
    wide = {**run, "gradient_accumulation_steps": 2, "output_dir": str(folder / "wide")}
    reference = run_alone(
        [
            settings(
                model,
                rows,
                folder,
                "full",
                1,
                gradient_accumulation_steps=8,
                output_dir=str(folder / "wide-1"),
            )
        ],
        folder / "wide-one",
    )
    # what two processes left in parts, four go on from, and two pairs of them
    shards = {**RUNS["shards"], "resume_from_checkpoint": str(folder / "shards-2" / "checkpoint-5")}
    narrow = settings(model, rows, folder, "shards", 4, **shards, fsdp="fsdp2")
    paired = {
        **narrow,
        "fsdp": "hybrid_shard",
        "fsdp_config": "shard_size=2,state_dict_type=sharded",
        "output_dir": str(folder / "paired"),
    }
    ranks = run_processes(4, [run, wide, narrow, paired], folder / "four")
    for found in ranks[0][2:]:
        assert "error" not in found, found
        whole = two["shards"][0]["losses"]
        assert found["losses"][-5:] == pytest.approx(whole[5:], abs=1e-4)
    for place, expected in enumerate((one["full"], reference[0])):
        found = ranks[0][place]
        assert "error" not in found, found
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
    for rank in ranks:
        assert rank[0]["bytes"]["optimizer"] == one["full"]["bytes"]["optimizer"] // 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fsdp": "fsdp2", "fsdp_config": "sharding_strategy=1"}, "--fsdp names it"),
        ({"fsdp": "fsdp2", "fsdp_config": "cpu_ofload=true"}, "cpu_offload"),
        ({"fsdp": "fsdp2", "fsdp_config": "shard_size=2"}, "hybrid_shard"),
        ({"fsdp": "shard_grad_op", "fsdp_config": "reshard_after_forward=true"}, "full_shard"),
        ({"fsdp": "fsdp2", "deepspeed": "zero2"}, "exclude each other"),
        ({"fsdp_config": "cpu_offload=true"}, "no effect without --fsdp"),
    ],
)
def test_a_setting_of_fsdp_that_means_nothing_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(model="m", dataset=["d"], **given)


@pytest.mark.gpu
def test_on_gpus_bfloat16_shards_learn_as_one_gpu(model: Path, rows: Path, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    runs = [
        settings(model, rows, folder, "full", 2, fsdp="fsdp2", output_dir=str(folder / "gpu")),
        settings(
            model,
            rows,
            folder,
            "full",
            2,
            fsdp="fsdp2",
            fsdp_config="cpu_offload=true",
            output_dir=str(folder / "gpu-offload"),
        ),
    ]
    single = settings(model, rows, folder, "full", 1, output_dir=str(folder / "gpu-one"))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    path = folder / "gpu-one.json"
    path.write_text(json.dumps([single]))
    worker = Path(__file__).parents[1] / "run_rank.py"
    subprocess.run(
        [sys.executable, str(worker), str(path)], env=environment, check=True, timeout=280
    )
    expected = json.loads(path.with_suffix(".0.json").read_text())[0]
    path = folder / "gpu-two.json"
    path.write_text(json.dumps(runs))
    start(2, [str(worker), str(path)], folder)
    for found in json.loads(path.with_suffix(".0.json").read_text()):
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-2)
