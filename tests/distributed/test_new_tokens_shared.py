"""New tokens on several processes: engines that learn the rows of one process, and save them whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

from processes import ids_of_steps, run_alone, run_processes, settings_of
from sftcore.config import MergeConfig
from sftcore.data import Encoder
from sftcore.export import merge
from stopping_models import Ending, make_model, make_rows, plain_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TEMPLATE = (
    "{% for message in messages %}{{ '<|say|>' + message.role + ':' + message.content + '<|over|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|say|>assistant:' }}{% endif %}"
)
ENDING = Ending(tokenizer="minimind", template=TEMPLATE, says=("so<|over|>",), stops=("<|over|>",))
NEW_ROWS = [6400, 6401]
"""Of an embedding that grows from 6400 to 6464 rows."""

LORA = {"tuner_type": "lora", "lora_rank": 4}
SHARED_SEQUENCE = {"sequence_parallel_size": 2, "gradient_accumulation_steps": 4}
SHARED_LAYERS = {"tensor_parallel_size": 2, "gradient_accumulation_steps": 4}
SHARDED = {"fsdp": "fsdp2", "fsdp_config": "state_dict_type=sharded"}
ONE: dict[str, dict[str, Any]] = {"lora": LORA, "full": {}}
TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("lora", {}),
    "ddp, full": ("full", {}),
    "fsdp2": ("lora", {"fsdp": "fsdp2"}),
    "fsdp2, recomputed": ("lora", {"fsdp": "fsdp2", "gradient_checkpointing": True}),
    "fsdp2, sharded": ("lora", SHARDED),
    "fsdp2, full": ("full", {"fsdp": "fsdp2"}),
    "shard_grad_op": ("lora", {"fsdp": "shard_grad_op"}),
    "ulysses": ("lora", SHARED_SEQUENCE),
    "tensor parallel, full": ("full", SHARED_LAYERS),
    "zero0": ("lora", {"deepspeed": "zero0"}),
    "zero1": ("lora", {"deepspeed": "zero1"}),
    "zero2": ("lora", {"deepspeed": "zero2"}),
    "zero2, full": ("full", {"deepspeed": "zero2"}),
}
"""Each engine with what one process trains the same way; a step has four examples either way."""
if importlib.util.find_spec("deepspeed") is None:
    TWO = {name: run for name, run in TWO.items() if "zero" not in name}
GOES_ON = ["ddp", "fsdp2", "fsdp2, sharded", "zero2"]
FROM_ONE = ["ddp", "fsdp2"]
Found = dict[str, dict[str, Any]]


def chosen(names: list[str]) -> list[str]:
    return [name for name in names if name in TWO]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model without the tokens of the template, its rows and the template beside it."""
    folder = tmp_path_factory.mktemp("base")
    make_rows(folder / "rows.jsonl")
    (folder / "mine.jinja").write_text(TEMPLATE, encoding="utf-8")
    return make_model(
        folder / "model", ENDING, shared_data / "tokenizers", ties=bool(request.param)
    )


def settings(base: Path, output: Path, **given: Any) -> dict[str, Any]:
    shared = {
        "template": str(base.parent / "mine.jinja"),
        "new_special_tokens": ["template"],
        "max_length": 128,
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 0,
    }
    return settings_of(base, base.parent / "rows.jsonl", output, **{**shared, **given})


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    runs = [settings(base, folder / name, **given) for name, given in ONE.items()]
    found = dict(zip(ONE, run_alone(runs, folder), strict=True))
    assert not [run["error"] for run in found.values() if "error" in run]
    return found


@pytest.fixture(scope="module")
def two(base: Path, one: Found, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the first of two processes finds, by engine, and what goes on from a checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    runs = {
        name: settings(
            base,
            folder / name,
            **{"gradient_accumulation_steps": 2, **ONE[tuner], **engine},
        )
        for name, (tuner, engine) in TWO.items()
    }
    for name in chosen(GOES_ON):
        middle = folder / name / "checkpoint-2"
        runs[f"{name}, gone on"] = {
            **runs[name],
            "resume_from_checkpoint": str(middle),
            "output_dir": str(folder / f"{name}, gone on"),
        }
    for name in FROM_ONE:
        runs[f"{name}, from one"] = {
            **runs[name],
            "resume_from_checkpoint": str(Path(one["lora"]["output_dir"]) / "checkpoint-2"),
            "output_dir": str(folder / f"{name}, from one"),
        }
    found: Found = {}
    # DeepSpeed leaves what others of the same processes would stumble over
    for kind in (True, False):
        some = {name: run for name, run in runs.items() if ("zero" in name) == kind}
        if some:
            ranks = run_processes(2, list(some.values()), folder / f"zero-{kind}")
            found |= dict(zip(some, ranks[0], strict=True))
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter or a model, not those of an optimizer beside it."""
    is_adapter = (folder / "adapter_config.json").is_file()
    return load_file(folder / f"{'adapter_' if is_adapter else ''}model.safetensors")


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the new rows: what was added to them, or the rows of a whole model."""
    weights = weights_of(folder)
    found = {name: value for name, value in weights.items() if name.endswith("tokens_delta")}
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return found or {name: weights[name][NEW_ROWS] for name in names if name in weights}


@pytest.mark.parametrize("name", TWO)
def test_two_processes_learn_what_one_learns(one: Found, two: Found, name: str) -> None:
    expected, found = one[TWO[name][0]], two[name]
    assert "error" not in found, found
    assert len(expected["losses"]) == 4
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
    runs = [Path(run["output_dir"]) for run in (expected, found)]
    assert ids_of_steps(runs[0]) == ids_of_steps(runs[1])


@pytest.mark.parametrize("name", TWO)
def test_the_rows_that_are_saved_are_those_of_one_process(
    one: Found, two: Found, base: Path, name: str
) -> None:
    folders = [Path(found["last"]) for found in (one[TWO[name][0]], two[name])]
    expected, found = (weights_of(folder) for folder in folders)
    assert {key: value.shape for key, value in expected.items()} == {
        key: value.shape for key, value in found.items()
    }
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 1e-3, key
    is_tied = plain_model(base, base).config.tie_word_embeddings
    for folder in folders:
        rows = rows_of(folder)
        assert len(rows) == (1 if is_tied else 2)
        for key, value in rows.items():
            assert value.shape == (2, 64)
            # both began as the same mean, and each learned something else
            assert (value[0] - value[1]).abs().max() > 1e-2, key
        encoder = Encoder.from_pretrained(folder)
        assert [encoder.token_id(token) for token in ("<|say|>", "<|over|>")] == NEW_ROWS
        assert (folder / "new_tokens.json").is_file() == (folder / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", [name for name, run in TWO.items() if run[0] == "lora"])
def test_a_merged_model_says_what_that_of_one_process_says(
    one: Found, two: Found, base: Path, name: str, tmp_path: Path
) -> None:
    logits = []
    for place, found in enumerate((one["lora"], two[name])):
        output = str(tmp_path / str(place))
        merged = merge(MergeConfig(adapters=found["last"], output_dir=output))
        model = plain_model(merged, base)
        with torch.no_grad():
            logits.append(model(torch.tensor([[6400, 500, 6401, 501]])).logits)
    assert logits[0].shape[-1] == 6464
    assert (logits[0] - logits[1]).abs().max() < 2e-3 * logits[0].std()


@pytest.mark.parametrize("name", chosen(GOES_ON))
def test_a_run_goes_on_with_its_rows(two: Found, name: str) -> None:
    whole, rest = two[name], two[f"{name}, gone on"]
    assert "error" not in rest, rest
    assert rest["steps"][-2:] == [3, 4]
    assert rest["losses"][-2:] == pytest.approx(whole["losses"][-2:], abs=1e-6)
    ended, resumed = (weights_of(Path(run["last"])) for run in (whole, rest))
    for key, value in ended.items():
        assert torch.allclose(resumed[key], value, atol=1e-6), key


@pytest.mark.parametrize("name", FROM_ONE)
def test_two_processes_go_on_from_the_rows_of_one(one: Found, two: Found, name: str) -> None:
    whole, rest = one["lora"], two[f"{name}, from one"]
    assert "error" not in rest, rest
    assert rest["losses"][-2:] == pytest.approx(whole["losses"][-2:], abs=1e-4)
    ended, resumed = (weights_of(Path(run["last"])) for run in (whole, rest))
    for key, value in ended.items():
        assert (resumed[key] - value).abs().max() < 1e-3, key
