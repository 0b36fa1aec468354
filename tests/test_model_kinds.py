"""Each kind of name of a model is taken by every command that takes a model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import transformers
from huggingface_hub import constants

from sftcore.cli import main
from sftcore.config import InferConfig
from sftcore.data import Encoder
from sftcore.infer import infer
from sftcore.models import registry
from sftcore.train import train
from tiny_gguf import write_gguf
from tiny_runs import config_of, make_rows

pytestmark = pytest.mark.slow

KINDS = ["folder", "hub id", ".gguf", "short name", "run folder", "checkpoint"]
PROMPT = "what is 1?"


def put_in_cache(hub: Path, name: str, model: Path) -> str:
    """Puts a model where the client of the hub keeps what it fetched."""
    home = hub / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / ("1" * 40)
    shutil.copytree(model, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("1" * 40)
    return name


@pytest.fixture(scope="module")
def names(
    model: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Each kind with a name of a small model, without any network."""
    folder = tmp_path_factory.mktemp("names")
    short_rows = make_rows(folder / "rows.jsonl", 8)
    run = folder / "run"
    result = train(
        config_of(
            model, short_rows, run, tuner_type="full", lora_dropout=0.05, max_steps=2, save_steps=1
        )
    )
    weights = transformers.AutoModelForCausalLM.from_pretrained(model)
    template = Encoder.from_pretrained(model).chat_template
    # a package with a file of weights inside, as the one of the short name is
    package = folder / "packages" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('found, never imported')")
    tokenizer = shared_data / "tokenizers" / "minimind"
    packaged = write_gguf(package / "tiny.gguf", weights, tokenizer, chat_template=template)
    single = shutil.copy(packaged, folder / "single.gguf")
    entry = {"package": "tiny-package", "file": "tiny.gguf"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTCORE_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.syspath_prepend(str(folder / "packages"))
        patch.setattr(registry, "read_registry", lambda: {"tiny": entry})
        yield {
            "folder": str(model),
            "hub id": put_in_cache(folder / "hub", "someone/tiny-model", model),
            ".gguf": str(single),
            "short name": "tiny",
            "run folder": str(run),
            "checkpoint": result["last_model_checkpoint"],
        }


@pytest.fixture(scope="module")
def answers(names: dict[str, str]) -> dict[str, str]:
    """What the model and the trained one say, each by the name of its folder."""
    return {
        kind: infer(InferConfig(model=names[kind], prompt=PROMPT, max_new_tokens=4))[0]["response"]
        for kind in ("folder", "checkpoint")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_takes_it(
    names: dict[str, str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(tmp_path / "rows.jsonl", 8)
    words = ["--dataset", str(rows), "--output_dir", str(tmp_path / "out"), "--dry_run", "true"]
    assert main(["train", "--model", names[kind], *words]) == 0
    assert f"{names[kind]}: 231,584 parameters" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_takes_it(
    names: dict[str, str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", names[kind], "--gpus", "2x24G"]) == 0
    assert "231,584 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_inference_takes_it_and_answers_the_same(
    names: dict[str, str], answers: dict[str, str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["infer", "--model", names[kind], "--prompt", PROMPT, "--max_new_tokens", "4"]) == 0
    is_trained = kind in ("run folder", "checkpoint")
    expected = answers["checkpoint" if is_trained else "folder"]
    assert answers["checkpoint"] != answers["folder"]
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_run_with_an_adapter_is_taken_where_its_base_can_be_found(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(tmp_path / "rows.jsonl", 8)
    run = tmp_path / "run"
    result = train(config_of(model, rows, run, max_steps=2, save_steps=1, learning_rate=0.1))
    checkpoint = result["last_model_checkpoint"]
    ways = [("--model", run), ("--adapters", run), ("--adapters", checkpoint)]
    said = []
    for flag, name in ways:
        capsys.readouterr()
        assert main(["infer", flag, str(name), "--prompt", PROMPT, "--max_new_tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].strip()
    assert said[0] == said[1] == said[2]
    merged = tmp_path / "merged"
    assert main(["merge", "--adapters", str(run), "--output_dir", str(merged)]) == 0
    assert (merged / "config.json").is_file()
    for words in (["train", "--dataset", str(rows)], ["plan", "--gpus", "1x24G"]):
        assert main([*words, "--model", str(run)]) != 0
        assert "the checkpoint of an adapter goes to --adapters" in capsys.readouterr().err
