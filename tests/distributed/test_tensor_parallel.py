"""Tensor parallelism: parts of each layer on each process, the same numbers as one process, and whole checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from processes import run_alone, run_processes, settings_of, start
from saved_models import logits_of, weights_of
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.distributed import World, choose_engine

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LORA = {"tuner_type": "lora", "lora_rank": 4, "target_modules": ["all-linear"]}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"max_grad_norm": 0.5, "weight_decay": 0.1, "save_steps": 5},
    "lora": {**LORA, "gradient_checkpointing": True, "max_grad_norm": 0.05, "save_steps": 5},
    "olora": {**LORA, "init_weights": "olora", "packing": True, "max_length": 256},
    "norms": {
        "max_grad_norm": 0.5,
        "predict_with_generate": True,
        "predict_rows": 3,
        "max_new_tokens": 4,
    },
    "joined": {**LORA, "learning_rate": 1e-3, "loss_impl": "plain"},
}
"""Each is run by one process, and by two that share the layers; `norms` and `joined` are other models."""


def other_model(folder: Path, model: Path, name: str) -> Path:
    """A Qwen3 with norms of heads and an odd vocabulary that is not tied, or a Phi-3, whose projections are packed."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name == "norms":
        config = transformers.Qwen3Config(
            vocab_size=49153, head_dim=16, attention_bias=True, tie_word_embeddings=False, **sizes
        )
    else:
        config = transformers.Phi3Config(vocab_size=49152, **sizes)
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((model / file).read_bytes())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor")


@pytest.fixture(scope="module")
def models(model: Path, folder: Path) -> dict[str, Path]:
    others = {name: other_model(folder / name, model, name) for name in ("norms", "joined")}
    return {name: others.get(name, model) for name in RUNS}


def settings(
    models: dict[str, Path], rows: Path, folder: Path, name: str, count: int, **more: Any
) -> dict[str, Any]:
    given = {"split_dataset_ratio": 0.1, **RUNS[name], **more}
    return settings_of(models[name], rows, folder / f"{name}-{count}", **given)


@pytest.fixture(scope="module")
def one(models: dict[str, Path], rows: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What one process finds."""
    runs = [settings(models, rows, folder, name, 1) for name in RUNS]
    return dict(zip(RUNS, run_alone(runs, folder / "one"), strict=True))


@pytest.fixture(scope="module")
def two(
    models: dict[str, Path], rows: Path, folder: Path, one: dict[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes finds that share the layers."""
    engine = {"tensor_parallel_size": 2}
    runs = [settings(models, rows, folder, name, 2, **engine) for name in RUNS]
    middle = {
        "full_on": ("full", folder / "full-2" / "checkpoint-5"),
        "from_one": ("lora", Path(one["lora"]["output_dir"]) / "checkpoint-5"),
    }
    for name, (kind, checkpoint) in middle.items():
        run = settings(models, rows, folder, kind, 2, **engine)
        output = str(folder / name)
        runs.append({**run, "resume_from_checkpoint": str(checkpoint), "output_dir": output})
    runs.append(settings(models, rows, folder, "full", 3, learning_rate=1e30, **engine))
    names = [*RUNS, *middle, "exploding"]
    ranks = run_processes(2, runs, folder / "two")
    return {name: [rank[place] for rank in ranks] for place, name in enumerate(names)}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_that_share_each_layer_learn_what_one_learns(
    one: dict[str, Any], two: dict[str, Any], name: str
) -> None:
    expected, found = one[name], two[name][0]
    assert "error" not in found, found
    assert len(expected["losses"]) == 10
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
    assert found["eval_losses"] == pytest.approx(expected["eval_losses"], abs=1e-4)
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("name", RUNS)
def test_what_was_saved_is_whole_and_loads_in_plain_libraries(
    one: dict[str, Any], two: dict[str, Any], models: dict[str, Path], name: str
) -> None:
    first, second = (Path(found["last"]) for found in (one[name], two[name][0]))
    expected, found = weights_of(first), weights_of(second)
    assert {key: value.shape for key, value in expected.items()} == {
        key: value.shape for key, value in found.items()
    }
    distance = (logits_of(first, models[name]) - logits_of(second, models[name])).abs().max()
    assert distance < 2e-3
    unchanged = logits_of(models[name], models[name])
    assert (logits_of(second, models[name]) - unchanged).abs().max() > 0.01


def test_each_process_has_half_of_what_can_be_parted(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    whole = one["full"]["bytes"]
    # norms are whole on each rank: two layers of two, and the last one, of 32 numbers in 4 bytes
    norms = 5 * 32 * 4
    for rank in two["full"]:
        for kind, size in whole.items():
            copies = 2 * norms if kind == "optimizer" else norms
            assert rank["bytes"][kind] == (size - copies) // 2 + copies, kind


@pytest.mark.parametrize("name", ["full_on", "from_one"])
def test_a_run_goes_on_from_its_checkpoint_and_from_that_of_one_process(
    one: dict[str, Any], two: dict[str, Any], name: str
) -> None:
    found = two[name][0]
    assert "error" not in found, found
    whole = one["lora"] if name == "from_one" else two[name.removesuffix("_on")][0]
    tolerance = 1e-4 if name == "from_one" else 1e-6
    assert found["steps"][-5:] == [6, 7, 8, 9, 10]
    assert found["losses"][-5:] == pytest.approx(whole["losses"][5:], abs=tolerance)


def test_generated_answers_are_those_of_one_process(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    def lines(found: dict[str, Any]) -> list[Any]:
        file = Path(found["output_dir"]) / "predictions" / "step-10.jsonl"
        return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]

    assert len(lines(one["norms"])) == 3
    assert lines(one["norms"]) == lines(two["norms"][0])


def test_a_loss_that_is_not_finite_ends_the_run_on_every_process(two: dict[str, Any]) -> None:
    for rank in two["exploding"]:
        assert "NonFiniteError" in rank["error"]


def test_two_groups_of_two_average_their_gradients(
    models: dict[str, Path], rows: Path, folder: Path, one: dict[str, Any]
) -> None:
    names = ("full", "lora")
    more = {"tensor_parallel_size": 2, "gradient_accumulation_steps": 2}
    runs = [settings(models, rows, folder, name, 4, **more) for name in names]
    ranks = run_processes(4, runs, folder / "four")
    for place, name in enumerate(names):
        found = ranks[0][place]
        assert "error" not in found, found
        assert found["losses"] == pytest.approx(one[name]["losses"], abs=1e-4)
        assert found["grad_norms"] == pytest.approx(one[name]["grad_norms"], rel=1e-3)
        assert found["eval_losses"] == pytest.approx(one[name]["eval_losses"], abs=1e-4)


def test_a_size_that_does_not_divide_the_heads_is_refused_with_those_that_do(
    models: dict[str, Path], rows: Path, folder: Path
) -> None:
    output = str(folder / "never")
    run = settings(models, rows, folder, "full", 4, tensor_parallel_size=4, output_dir=output)
    for rank in run_processes(4, [run], folder / "refused"):
        assert "num_key_value_heads 2" in rank[0]["error"]
        assert "2 would fit" in rank[0]["error"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim": "adafactor"}, "adamw_torch"),
        ({"tuner_type": "lora", "use_dora": True}, "take --tuner_type lora"),
        ({"tuner_type": "lora", "quant_method": "bnb", "quant_bits": 4}, "packed weights"),
        ({"gradient_checkpointing_kind": "offload"}, "--gradient_checkpointing true"),
    ],
)
def test_what_needs_whole_weights_is_refused_with_what_does_not(
    given: dict[str, Any], words: str
) -> None:
    config = TrainConfig(model="m", dataset=["d"], tensor_parallel_size=2, **given)
    world = World(size=2, local_size=2, model_parallel_size=2)
    with pytest.raises(ConfigError, match=words):
        choose_engine(config, world)


@pytest.mark.gpu
def test_on_gpus_two_processes_share_layers_in_bfloat16(
    models: dict[str, Path], rows: Path, folder: Path
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = folder / "gpu.json"
    for name in ("full", "lora"):
        output = str(folder / f"gpu-{name}")
        run = settings(models, rows, folder, name, 2, tensor_parallel_size=2, output_dir=output)
        single = settings(models, rows, folder, name, 1, output_dir=f"{output}-one")
        path.write_text(json.dumps([run]))
        start(2, [str(Path(__file__).parents[1] / "run_rank.py"), str(path)], folder)
        found = json.loads(path.with_suffix(".0.json").read_text())[0]
        expected = run_alone([single], folder / f"gpu-{name}-alone")[0]
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-2)
    assert os.environ.get("RANK") is None
