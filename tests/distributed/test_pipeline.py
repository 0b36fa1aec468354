"""A pipeline of stages learns what a single process learns, and saves what plain Transformers and PEFT load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from processes import ids_of_steps, run_processes, settings_of, start
from saved_models import logits_of, weights_of
from sftcore.config import TrainConfig
from sftcore.data import Encoder
from sftcore.errors import ConfigError
from sftcore.train.distributed import World, choose_engine
from sftcore.train.resume import find_resume

RARE = " ☃"
Found = dict[str, Any]

# of a run: the model, and its settings
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    # gradients of the tied embedding are added, and clipped by the norm of all stages
    "full": ("tied", {"max_grad_norm": 0.5, "save_steps": 5}),
    "lora": (
        "untied",
        {
            "tuner_type": "lora",
            "gradient_checkpointing": True,
            "save_steps": 5,
            "test_oom": True,
        },
    ),
    "packed": ("tied", {"packing": True, "max_length": 256, "pipeline_schedule": "gpipe"}),
    # micro-batches of unlike shapes, whole logits, weights of tokens, and a best checkpoint
    "weighted": (
        "untied",
        {
            "tokens_per_batch": 300,
            "loss_impl": "plain",
            "label_smoothing": 0.1,
            "max_grad_norm": 0.0,
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
        },
    ),
    "saved modules": (
        "untied",
        {
            "tuner_type": "lora",
            "modules_to_save": ["lm_head", "embed_tokens", "norm"],
            "save_steps": 5,
        },
    ),
    "skipped": ("poisoned", {"on_non_finite": "skip"}),
    "frozen": ("tied", {"tuner_type": "freeze", "freeze_parameters_ratio": 0.9}),
}


RESUMED = ["full", "lora", "saved modules"]


def make_model(folder: Path, shared_data: Path, *, is_tied: bool, layers: int = 4) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=6400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=is_tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = shared_data / "tokenizers" / "minimind" / name
        (folder / name).write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def models(
    shared_data: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A tied and an untied model of four layers, and one with an infinite embedding of a rare token."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "tied": make_model(folder / "tied", shared_data, is_tied=True),
        "untied": make_model(folder / "untied", shared_data, is_tied=False),
        "poisoned": make_model(folder / "poisoned", shared_data, is_tied=False),
    }
    net = transformers.AutoModelForCausalLM.from_pretrained(made["poisoned"])
    encoder = Encoder.from_pretrained(made["poisoned"])
    common = set(encoder.tokenize(rows.read_text(encoding="utf-8")).tolist())
    token = next(one for one in encoder.tokenize(RARE).tolist() if one not in common)
    net.model.embed_tokens.weight.data[token] = math.inf
    net.save_pretrained(made["poisoned"])
    return made


@pytest.fixture(scope="module")
def weighted_rows(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real rows whose answers count more or less, and five with a rare token."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    made = [
        {
            "messages": [
                {"role": "user", "content": line["question"]},
                {
                    "role": "assistant",
                    "content": line["answer"] + RARE * (number % 13 == 5),
                    "weight": 0.5 + number % 3,
                },
            ]
        }
        for number, line in enumerate(lines)
    ]
    file = tmp_path_factory.mktemp("weighted") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in made), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def found(
    models: dict[str, Path],
    rows: Path,
    weighted_rows: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[list[Found]]]:
    """What each rank found of each run: alone, in two stages, and in two pipelines of two stages."""
    folder = tmp_path_factory.mktemp("pipeline")

    def runs_of(place: str, stages: int, pipelines: int) -> list[dict[str, Any]]:
        made = []
        for name, (model, given) in RUNS.items():
            settings = {"split_dataset_ratio": 0.2, **given}
            if stages == 1:
                settings.pop("pipeline_schedule", None)
            made.append(
                settings_of(
                    models[model],
                    weighted_rows if name in ("weighted", "skipped") else rows,
                    folder / f"{name}-{place}",
                    gradient_accumulation_steps=4 // pipelines,
                    pipeline_parallel_size=stages,
                    **settings,
                )
            )
        return made

    two = runs_of("two", 2, 1)
    for name in RESUMED:
        made = two[list(RUNS).index(name)]
        again = {
            "output_dir": f"{made['output_dir']}-resumed",
            "resume_from_checkpoint": f"{made['output_dir']}/checkpoint-5",
        }
        two.append({**made, **again})
    # what is refused once the model is known
    two += [
        {**two[1], "output_dir": str(folder / "idle"), "layers_to_transform": [3]},
        {
            **two[0],
            "output_dir": str(folder / "ends"),
            "tuner_type": "lora",
            "lora_dropout": 0.0,
            "modules_to_save": ["EMBEDDING"],
        },
    ]
    return {
        "one": run_processes(1, runs_of("one", 1, 1), folder / "1"),
        "two": run_processes(2, two, folder / "2"),
        "four": run_processes(4, runs_of("four", 2, 2)[:3], folder / "4"),
    }


def run_of(found: dict[str, list[list[Found]]], place: str, name: str, rank: int = 0) -> Found:
    return found[place][rank][list(RUNS).index(name)]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_stages_learn_what_one_process_learns(found: dict[str, Any], name: str) -> None:
    alone, staged = run_of(found, "one", name), run_of(found, "two", name)
    assert len(alone["losses"]) == (10 if name != "skipped" else len(staged["losses"]))
    assert staged["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert staged["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)
    assert alone["eval_losses"]
    assert staged["eval_losses"] == pytest.approx(alone["eval_losses"], abs=1e-4)
    if name == "full":
        assert alone["losses"][-1] < alone["losses"][0]
    one, two = (
        [entry["token_acc"] for entry in log_of(run) if "token_acc" in entry]
        for run in (alone, staged)
    )
    assert one
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora", "packed"])
def test_two_pipelines_share_the_data_and_learn_the_same(found: dict[str, Any], name: str) -> None:
    alone, shared = run_of(found, "one", name), run_of(found, "four", name)
    assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert shared["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)
    assert shared["eval_losses"] == pytest.approx(alone["eval_losses"], abs=1e-4)
    assert ids_of_steps(Path(shared["output_dir"])) == ids_of_steps(Path(alone["output_dir"]))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora", "saved modules", "frozen"])
def test_what_stages_save_is_what_one_process_saves(
    found: dict[str, Any], models: dict[str, Path], name: str
) -> None:
    one, two = (Path(run_of(found, place, name)["last"]) for place in ("one", "two"))
    base = models[RUNS[name][0]]
    alone, staged = (logits_of(folder, base) for folder in (one, two))
    assert (alone - staged).abs().max() < 1e-3
    assert (alone - logits_of(base, base)).abs().max() > 1e-2
    names = [set(weights_of(folder)) for folder in (one, two)]
    assert names[0] == names[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_each_stage_writes_its_own_weights(found: dict[str, Any]) -> None:
    folder = Path(run_of(found, "two", "full")["last"])
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    first, second = (load_file(folder / name) for name in files)
    assert not set(first) & set(second)
    assert "model.embed_tokens.weight" in first
    assert "model.norm.weight" in second
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(second)
    size = sum(value.numel() * value.element_size() for value in (first | second).values())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    # of moments and steps, what the trained weights of a stage take
    for part, name in ((first, "optimizer.pt"), (second, "optimizer-stage-1.pt")):
        state = torch.load(folder / name, weights_only=True)["state"].values()
        kept = sum(one["exp_avg"].numel() for one in state)
        own = sum(value.numel() for value in part.values())
        assert kept == own + (first["model.embed_tokens.weight"].numel() if part is second else 0)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_pipeline_equals_one_that_was_not_stopped(
    found: dict[str, Any], name: str
) -> None:
    straight = run_of(found, "two", name)
    resumed = found["two"][0][len(RUNS) + RESUMED.index(name)]
    assert resumed["losses"][-5:] == straight["losses"][-5:]
    assert resumed["grad_norms"][-5:] == straight["grad_norms"][-5:]
    one, two = (weights_of(Path(run["last"])) for run in (straight, resumed))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.mark.distributed
@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_a_single_process(found: dict[str, Any]) -> None:
    steps = []
    for place in ("one", "two"):
        folder = Path(run_of(found, place, "weighted")["output_dir"])
        result = json.loads((folder / "result.json").read_text())
        steps.append(Path(result["best_model_checkpoint"]).name)
        assert (folder / "config.json").is_file()
    assert steps[0] == steps[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_by_all_stages(found: dict[str, Any]) -> None:
    one, two = (
        json.loads((Path(run_of(found, place, "skipped")["output_dir"]) / name).read_text())
        for place in ("one", "two")
        for name in ("non_finite.json",)
    )
    assert one["num_steps"] == two["num_steps"] > 0
    for event, other in zip(one["first_steps"], two["first_steps"], strict=True):
        assert event["step"] == other["step"]
        assert event["each_alone"] == other["each_alone"] is True
        assert {row["line"] for row in event["rows"]} == {row["line"] for row in other["rows"]}


@pytest.mark.distributed
@pytest.mark.slow
def test_what_cannot_be_run_is_refused_by_every_stage(found: dict[str, Any]) -> None:
    reasons = ["has nothing to train", "two stages"]
    for rank in found["two"]:
        for run, reason in zip(rank[-2:], reasons, strict=True):
            assert "ConfigError" in run["error"]
            assert reason in run["error"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("place", "stages"), [("one", 2), ("two", 1), ("two", 4)])
def test_a_checkpoint_of_other_stages_is_refused(
    found: dict[str, Any], models: dict[str, Path], rows: Path, place: str, stages: int
) -> None:
    checkpoint = str(Path(run_of(found, place, "full")["output_dir"]) / "checkpoint-5")
    given = settings_of(
        models["tied"], rows, Path(checkpoint).parent.parent / "new", max_grad_norm=0.5
    )
    given |= {"split_dataset_ratio": 0.2, "save_steps": 5, "resume_from_checkpoint": checkpoint}
    config = TrainConfig(**given, pipeline_parallel_size=stages)
    engine = choose_engine(config, World(size=stages, model_parallel_size=stages))
    with pytest.raises(ConfigError, match="keeps the state of its optimizer as"):
        find_resume(config, engine)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tuner_type": "adalora"}, "stages train full, freeze, lora"),
        ({"tuner_type": "lora", "use_dora": True}, "norms"),
        ({"tuner_type": "lora", "init_weights": "pissa"}, "expected one of true"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"fsdp": "fsdp2"}, "exclude each other"),
    ],
)
def test_settings_that_stages_cannot_train_are_refused(
    model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    given = settings_of(model, rows, tmp_path, pipeline_parallel_size=2, **settings)
    with pytest.raises(ConfigError, match=reason):
        TrainConfig(**given)


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_two_gpus_in_bfloat16_learn_what_one_learns(
    models: dict[str, Path], rows: Path, tmp_path: Path, schedule: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices; there are {torch.cuda.device_count()}")
    losses = []
    for stages in (1, 2):
        settings = settings_of(models["tied"], rows, tmp_path / str(stages), torch_dtype="bfloat16")
        if stages > 1:
            settings |= {"pipeline_parallel_size": 2, "pipeline_schedule": schedule}
        config = tmp_path / f"{stages}.yaml"
        config.write_text(json.dumps(settings), encoding="utf-8")
        start(stages, ["-m", "sftcore.cli", "train", "--config", str(config)], tmp_path)
        result = json.loads((tmp_path / str(stages) / "result.json").read_text())
        losses.append([entry["loss"] for entry in result["log_history"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=3e-2)


def log_of(run: Found) -> list[dict[str, Any]]:
    result = json.loads((Path(run["output_dir"]) / "result.json").read_text())
    log: list[dict[str, Any]] = result["log_history"]
    return log
