"""DeepSpeed's ZeRO learns what a single process learns, and what it saves is whole."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file

from processes import ids_of_steps, run_named, settings_of, start
from saved_models import logits_of
from sftcore.data import Encoder

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"
    ),
]

STAGES = ("zero0", "zero1", "zero2", "zero3")
# clipping is at work: the norms are above it
SHARED = {"max_grad_norm": 0.2, "split_dataset_ratio": 0.1, "save_total_limit": 0}
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"tuner_type": "full", "packing": True, "max_length": 256},
    "lora": {"tuner_type": "lora", "gradient_checkpointing": True},
}
ANSWERED = {"predict_with_generate": True, "predict_rows": 3, "max_new_tokens": 5}
RUNS = [*((stage, "full") for stage in STAGES), ("zero2", "lora"), ("zero3", "lora")]
SAVED = ("zero2-full", "zero3-full", "zero3-lora")
Found = dict[str, dict[str, Any]]


def run_shared(count: int, runs: Found, folder: Path, model: Path, rows: Path) -> Found:
    """Trains with the settings that all runs have, and with their own."""
    whole = {
        name: {"gradient_accumulation_steps": 4 // count, **SHARED, **given}
        for name, given in runs.items()
    }
    return run_named(count, whole, folder, model, rows)


@pytest.fixture(scope="module")
def alone(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A single process without an engine."""
    runs = {name: {**settings, **ANSWERED} for name, settings in TUNERS.items()}
    return run_shared(1, runs, tmp_path_factory.mktemp("alone"), model, rows)


@pytest.fixture(scope="module")
def shared(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two processes, by stage and tuner."""
    runs = {f"{stage}-{name}": {"deepspeed": stage, **TUNERS[name]} for stage, name in RUNS}
    for run in SAVED:
        runs[run] |= {**ANSWERED, "save_steps": 4, "eval_steps": 4, "load_best_model_at_end": True}
    return run_shared(2, runs, tmp_path_factory.mktemp("zero"), model, rows)


@pytest.fixture(scope="module")
def gone_on(
    shared: Found, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """The runs of `shared` that were saved, from their fourth step on."""
    saves = {**ANSWERED, "save_steps": 4, "eval_steps": 4, "load_best_model_at_end": True}
    runs: Found = {}
    for run in SAVED:
        stage, name = run.split("-")
        at = str(Path(shared[run]["output_dir"]) / "checkpoint-4")
        runs[run] = {
            "deepspeed": stage,
            **TUNERS[name],
            **saves,
            "resume_from_checkpoint": at,
        }
    runs["weights"] = {**runs["zero3-full"], "resume_only_model": True}
    return run_shared(2, runs, tmp_path_factory.mktemp("gone_on"), model, rows)


@pytest.mark.parametrize(("stage", "name"), RUNS)
def test_losses_norms_and_evaluations_are_those_of_a_single_process(
    alone: Found, shared: Found, stage: str, name: str
) -> None:
    one, many = alone[name], shared[f"{stage}-{name}"]
    assert len(many["losses"]) == 10
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert many["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-3)
    assert many["eval_losses"][-1] == pytest.approx(one["eval_losses"][-1], abs=1e-4)
    assert max(one["grad_norms"]) > 0.2
    assert one["losses"][-1] < one["losses"][0]
    assert ids_of_steps(Path(one["output_dir"])) == ids_of_steps(Path(many["output_dir"]))


@pytest.mark.parametrize(("stage", "name"), RUNS)
def test_what_is_saved_loads_in_plain_libraries_and_says_what_a_single_process_says(
    alone: Found, shared: Found, model: Path, stage: str, name: str
) -> None:
    found = logits_of(Path(shared[f"{stage}-{name}"]["last"]), model)
    assert (found - logits_of(Path(alone[name]["last"]), model)).abs().max() < 1e-3
    assert (found - logits_of(model, model)).abs().max() > 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_a_head_that_is_the_embedding_is_saved_once(
    alone: Found, shared: Found, stage: str
) -> None:
    expected, found = (
        load_file(Path(one["last"]) / "model.safetensors")
        for one in (alone["full"], shared[f"{stage}-full"])
    )
    assert "lm_head.weight" not in expected
    assert set(found) == set(expected)


@pytest.mark.parametrize("run", SAVED)
def test_a_resumed_run_is_the_uninterrupted_one(shared: Found, gone_on: Found, run: str) -> None:
    whole, rest = shared[run], gone_on[run]
    assert rest["losses"] == whole["losses"]
    assert rest["eval_losses"] == whole["eval_losses"]
    name = "adapter_model.safetensors" if run.endswith("lora") else "model.safetensors"
    ended, resumed = (load_file(Path(one["last"]) / name) for one in (whole, rest))
    for key, weights in ended.items():
        assert torch.equal(weights, resumed[key]), key


def test_weights_of_a_checkpoint_begin_a_new_optimizer(shared: Found, gone_on: Found) -> None:
    whole, fresh = shared["zero3-full"], gone_on["weights"]
    # the loss of the first step is of the loaded weights alone
    assert fresh["losses"][4] == pytest.approx(whole["losses"][4], abs=1e-5)
    assert fresh["losses"][5:] != whole["losses"][5:]


@pytest.mark.parametrize("run", ["zero2-full", "zero3-full"])
def test_generated_answers_are_those_of_a_single_process(
    alone: Found, shared: Found, run: str
) -> None:
    lines = [
        (Path(found["output_dir"]) / "predictions" / "step-10.jsonl").read_text(encoding="utf-8")
        for found in (alone["full"], shared[run])
    ]
    assert lines[0].count("\n") == 3
    assert lines[0] == lines[1]


def test_the_best_checkpoint_lies_in_the_run_folder(shared: Found, model: Path) -> None:
    for run in ("zero2-full", "zero3-full"):
        folder = Path(shared[run]["output_dir"])
        result = json.loads((folder / "result.json").read_text())
        best = Path(result["best_model_checkpoint"])
        assert best.is_relative_to(folder)
        assert torch.equal(logits_of(folder, model), logits_of(best, model))


@pytest.fixture(scope="module")
def sizes(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks keeps, by stage, in bytes."""
    folder = tmp_path_factory.mktemp("sizes")
    path = folder / "runs.json"
    runs = [
        settings_of(
            model,
            rows,
            folder / stage,
            deepspeed=stage,
            max_steps=2,
            gradient_accumulation_steps=2,
        )
        for stage in STAGES
    ]
    path.write_text(json.dumps(runs))
    start(2, [str(Path(__file__).parents[1] / "measure_zero.py"), str(path)], folder)
    return [json.loads((folder / f"runs.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", range(4))
def test_each_stage_keeps_what_its_formula_says(sizes: list[Any], stage: int) -> None:
    for rank in range(2):
        found = sizes[rank][stage]
        weights = 4 * found["parameters_in_all"]
        # float32 everywhere: weights, gradients, two moments, and the optimizer's own copy where it is sharded
        expected = {
            "parameters": weights / 2 if stage >= 3 else weights,
            "gradients": weights / 2 if stage >= 2 else weights,
            "optimizer": 3 * weights / 2 if stage >= 1 else 2 * weights,
        }
        print(f"stage {stage}, rank {rank}: {found} beside {expected}")
        for name, size in expected.items():
            # small tensors that are kept whole, and padding of shards
            assert found[name] == pytest.approx(size, rel=0.01), (stage, name)


def test_offloading_learns_the_same(alone: Found, model: Path, rows: Path, tmp_path: Path) -> None:
    runs = {
        "two": {"deepspeed": "zero2_offload", **TUNERS["full"]},
        "three": {"deepspeed": "zero3_offload", **TUNERS["lora"]},
    }
    found = run_shared(2, runs, tmp_path, model, rows)
    for name, tuner in (("two", "full"), ("three", "lora")):
        assert found[name]["losses"] == pytest.approx(alone[tuner]["losses"], abs=1e-4)
        assert found[name]["grad_norms"] == pytest.approx(alone[tuner]["grad_norms"], rel=1e-3)


def test_one_process_is_enough_and_another_number_is_refused(
    alone: Found, shared: Found, model: Path, rows: Path, tmp_path: Path
) -> None:
    checkpoint = str(Path(shared["zero2-full"]["output_dir"]) / "checkpoint-4")
    runs = {
        "one": {"deepspeed": "zero3", **TUNERS["full"]},
        "fewer": {
            "deepspeed": "zero2",
            **TUNERS["full"],
            "resume_from_checkpoint": checkpoint,
            "add_version": True,
        },
        "other": {
            "deepspeed": "zero1",
            **TUNERS["full"],
            "resume_from_checkpoint": checkpoint,
            "add_version": True,
        },
    }
    found = run_shared(1, runs, tmp_path, model, rows)
    assert found["one"]["losses"] == pytest.approx(alone["full"]["losses"], abs=1e-4)
    assert "goes on with as many, not with 1" in found["fewer"]["error"]
    assert (
        "as deepspeed-zero2, and DeepSpeed ZeRO-1 takes deepspeed-zero1" in found["other"]["error"]
    )


def test_steps_that_are_not_finite_leave_the_weights(
    model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    poisoned, rows = tmp_path_factory.mktemp("poisoned"), tmp_path / "rows.jsonl"
    lines = [{"question": f"{n} plus one?", "answer": f"It is {n + 1}."} for n in range(40)]
    tokenize = Encoder.from_pretrained(model).tokenize
    common = set(tokenize(" ".join(map(json.dumps, lines))).tolist())
    token = next(one for one in tokenize(" ☃").tolist() if one not in common)
    lines[11]["answer"] += " ☃"
    rows.write_text("\n".join(map(json.dumps, lines)))
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    net.config.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
    net.model.embed_tokens.weight.data[token] = math.inf
    net.save_pretrained(poisoned)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (poisoned / name).write_bytes((model / name).read_bytes())
    # the embedding that is infinite is frozen, so that its decay does not spread
    settings = {"freeze_parameters": ["model.embed_tokens"], "split_dataset_ratio": 0.0}
    runs = {
        f"{stage}-{how}": {"deepspeed": stage, "on_non_finite": how, **settings}
        for stage in ("zero0", "zero2", "zero3")
        for how in ("raise", "skip")
    }
    found = run_shared(2, runs, tmp_path / "runs", poisoned, rows)
    for stage in ("zero0", "zero2", "zero3"):
        assert "the loss is not finite" in found[f"{stage}-raise"]["error"]
        assert f"{rows}:12" in found[f"{stage}-raise"]["error"]
        saved = load_file(Path(found[f"{stage}-skip"]["last"]) / "model.safetensors")
        assert all(
            torch.isfinite(weights).all()
            for name, weights in saved.items()
            if "embed_tokens" not in name
        )
        logged = [loss for loss in found[f"{stage}-skip"]["losses"] if math.isfinite(loss)]
        assert len(logged) == 9
    assert found["zero2-skip"]["losses"] == pytest.approx(found["zero0-skip"]["losses"], abs=1e-4)
    assert found["zero3-skip"]["losses"] == pytest.approx(found["zero0-skip"]["losses"], abs=1e-4)


def test_bfloat16_keeps_float32_weights_beside(model: Path, rows: Path, tmp_path: Path) -> None:
    runs = {
        stage: {"deepspeed": stage, "tuner_type": "full", "torch_dtype": "bfloat16"}
        for stage in ("zero1", "zero2", "zero3")
    } | {"exact": {"deepspeed": "zero2", "tuner_type": "full"}}
    found = run_shared(2, runs, tmp_path, model, rows)
    for stage in ("zero1", "zero2", "zero3"):
        assert found[stage]["losses"] == pytest.approx(found["exact"]["losses"], abs=0.05)
        saved = load_file(Path(found[stage]["last"]) / "model.safetensors")
        assert {weights.dtype for weights in saved.values()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_zero_runs_over_nccl(model: Path, rows: Path, tmp_path: Path) -> None:
    count = min(2, torch.cuda.device_count())
    runs = {stage: {"deepspeed": stage, **TUNERS["full"]} for stage in STAGES}
    found = run_shared(count, runs, tmp_path, model, rows)
    for stage in STAGES[1:]:
        assert found[stage]["losses"] == pytest.approx(found["zero0"]["losses"], abs=0.05)
