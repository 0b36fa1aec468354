"""The edges that a stranger meets first: tiny data, odd files, wrong models, and what inference takes over."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sftcore.cli import main
from sftcore.config import InferConfig, MergeConfig
from sftcore.data import Encoder
from sftcore.data.prompts import read_prompts
from sftcore.errors import ConfigError, RowError, SftcoreError
from sftcore.export import merge
from sftcore.infer.generate import Chat
from sftcore.models import load_settings
from sftcore.models.attention import choose_attention
from sftcore.models.vocabulary import check_vocabulary
from sftcore.train import train
from sftcore.train.checkpoints import Manifest
from sftcore.train.largest import explain_out_of_memory
from sftcore.train.output import folder_of_runs
from sftcore.train.resume import Resume, prepare_folder
from tiny_runs import config_of, make_model, make_rows

# ends of lines to str.splitlines(), and characters like any other to JSON
ODD = "one\u2028two\x85three"


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with a system message."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = make_rows(folder / "rows.jsonl", 4)
    config = config_of(model, rows, folder / "run", max_steps=1, system="You are terse.")
    return Path(train(config)["last_model_checkpoint"])


def untied(model: Path, folder: Path, **settings: Any) -> Path:
    """The model with a head of its own."""
    config = transformers.LlamaConfig.from_pretrained(model, tie_word_embeddings=False, **settings)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


# words of the command line; each run has three rows and at most one step
RUNS = {
    "one step": [],
    "one row": ["--dataset", "one.jsonl"],
    "a tenth of an epoch": ["--num_train_epochs", "0.1", "--max_steps", "-1"],
    "a batch larger than the data": ["--per_device_train_batch_size", "64"],
    "steps that are larger than the data": ["--gradient_accumulation_steps", "9"],
    "a pack larger than the data": ["--packing", "true"],
    "no padding": ["--padding_free", "true", "--per_device_train_batch_size", "2"],
    "fewer tokens than an example has": ["--tokens_per_batch", "3"],
    "a share that holds out nothing": ["--split_dataset_ratio", "0.000001"],
    "nothing but the end is evaluated": ["--split_dataset_ratio", "0.4", "--eval_steps", "99"],
    "evaluation by epochs": ["--split_dataset_ratio", "0.4", "--eval_strategy", "epoch"],
    "no checkpoint but the last": ["--save_strategy", "no"],
    "the head alone": ["--tuner_type", "freeze", "--trainable_parameters", "lm_head"],
    "an adapter on the head alone": ["--target_modules", "lm_head"],
    "the largest batch first": ["--test_oom", "true"],
    "a stream shorter than the run": ["--streaming", "true"],
}


def test_the_smallest_runs_reach_their_end(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = untied(model, tmp_path / "untied")
    make_rows(tmp_path / "rows.jsonl", 3)
    make_rows(tmp_path / "one.jsonl", 1)
    words = ["train", "--model", str(whole), "--template", "chatml", "--add_version", "false"]
    words += ["--logging_steps", "50", "--report_to", "none", "--disable_tqdm"]
    failed = {}
    for name, more in RUNS.items():
        output = tmp_path / name.replace(" ", "-")
        given = [*words, "--output_dir", str(output)]
        for flag, value in {"--dataset": "rows.jsonl", "--max_steps": "1"}.items():
            given += [] if flag in more else [flag, value]
        code = main([*given, *more])
        said = capsys.readouterr()
        result = json.loads((output / "result.json").read_text()) if code == 0 else {}
        if code or result["global_step"] != 1 or not Path(said.out.strip()).is_dir():
            failed[name] = (code, said.err.splitlines()[-3:], result.get("global_step"))
    assert failed == {}


def test_what_cannot_be_trained_is_told_in_a_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_rows(tmp_path / "rows.jsonl", 3)
    (tmp_path / "wrong.yaml").write_text("lerning_rate: 1\n")
    (tmp_path / "latin.yaml").write_bytes("system: \xe9\n".encode("latin-1"))
    t5, bare, cut = tmp_path / "t5", tmp_path / "bare", tmp_path / "cut"
    shutil.copytree(model, cut)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    transformers.T5Config(num_layers=1, d_model=8).save_pretrained(t5)
    shutil.copytree(model, bare)
    (t5 / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["chat_template"]
    for folder in (t5, bare):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    cases = {
        "no causal language model": ["--model", str(t5)],
        "pass --template default (for a base model)": ["--model", str(bare), "--template", "auto"],
        "--max_length 4096 is out of range": ["--max_length", "4096"],
        'unknown setting "lerning_rate"; did you mean learning_rate?': ["--config", "wrong.yaml"],
        "latin.yaml: not YAML in UTF-8": ["--config", "latin.yaml"],
        "--attn_impl sdap is unknown; expected auto, sdpa": ["--attn_impl", "sdap"],
        "did you mean sdpa?": ["--attn_impl", "sdap"],
        "but 1 of the 1 steps of this run": ["--tuner_type", "adalora", "--max_steps", "1"],
        "the weights are damaged": ["--model", str(cut)],
        "--output_dir rows.jsonl cannot be made: file exists": [
            "--output_dir",
            "rows.jsonl",
            "--add_version",
            "false",
        ],
        "rows.jsonl/b/c cannot be made: not a directory": ["--output_dir", "rows.jsonl/b/c"],
        "all 3 rows also stand in": ["--val_dataset", "rows.jsonl", "--dedup", "exact"],
        "--seed -1 is out of range: expected 0 to": ["--seed", "-1"],
        "--learning_rate is 'inf'": ["--learning_rate=inf"],
    }
    words = {"--model": str(model), "--dataset": "rows.jsonl", "--template": "chatml"}
    for text, more in cases.items():
        given = [word for pair in words.items() if pair[0] not in more for word in pair]
        assert main(["train", *given, *more]) in (1, 2), text
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
        assert text.removeprefix("--learning_rate") in errors[0]


def test_what_only_training_needs_is_named_where_it_is_missing() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom sftcore.cli import main\n"
        "sys.exit(main(['train', '--model', 'm', '--dataset', 'd']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "\nerror: this command needs the package torch, which is not in" in f"\n{done.stderr}"
    assert done.stderr.endswith('run pip install "sftcore[train]"\n')


def test_prompts_are_read_as_they_were_written(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text(f"{ODD}\r\nsecond\n", encoding="utf-8-sig", newline="")
    assert [prompt[0]["content"] for prompt in read_prompts(text)] == [ODD, "second"]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": ODD} for role in roles]
    rows = [{"query": ODD}, {"messages": messages}]
    text_of_rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    lines.write_text(text_of_rows, encoding="utf-8")
    assert read_prompts(lines) == [[{"role": "user", "content": ODD}], messages[:3]]
    for wrong in ({"messages": messages[1:2]}, {"messages": ["hi"]}, {"messages": []}, ["hi"]):
        lines.write_text(json.dumps(wrong))
        with pytest.raises(RowError, match=r"a\.jsonl:1: a prompt has neither"):
            read_prompts(lines)
    text.write_bytes(b"caf\xe9")
    with pytest.raises(RowError, match=r"a\.txt: not UTF-8"):
        read_prompts(text)


def test_a_resume_keeps_generated_texts_with_odd_characters(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "answer": ODD} for step in (1, 2, 3)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run / "generations.jsonl").write_text(text + '{"step": 3, "answ', encoding="utf-8")
    manifest = Manifest(
        step=2,
        saved=0.0,
        only_model=False,
        world_size=1,
        versions={},
        files={},
        unlogged_loss=0.0,
        logged_step=2,
        unlogged_tally=None,
        evaluation_due=False,
    )
    found = Resume(checkpoint=run / "checkpoint-2", run_folder=run, manifest=manifest, changed={})
    prepare_folder(found, run)
    kept = (run / "generations.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in kept if line] == lines[:2]


def test_memory_that_runs_out_without_a_word_is_explained(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path, tmp_path)
    with (
        pytest.raises(SftcoreError, match=r"2 x 7 tokens: .*\(MemoryError\)"),
        explain_out_of_memory([(2, 7)], config),
    ):
        raise MemoryError


def test_a_run_has_the_name_of_its_model_however_it_is_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, link = tmp_path / "qwen", tmp_path / "link"
    (home / "inner").mkdir(parents=True)
    link.symlink_to(model, target_is_directory=True)
    monkeypatch.chdir(home / "inner")
    names = {".": "inner", "..": "qwen", "../": "qwen", str(link): "link", "org/name": "name"}
    for given, name in names.items():
        config = config_of(Path(given), tmp_path, Path("out"), add_version=True)
        config = type(config)(**{**config.to_dict(), "model": given})
        assert folder_of_runs(config) == Path("out") / name


def test_a_merge_never_replaces_what_it_merges(tuned: Path, model: Path) -> None:
    for output in (tuned, tuned.parent, model, model.parent):
        config = MergeConfig(adapters=str(tuned), output_dir=str(output), overwrite=True)
        with pytest.raises(ConfigError, match="which it would replace; expected another folder"):
            merge(config)
    assert (tuned / "adapter_model.safetensors").is_file()
    assert (model / "model.safetensors").is_file()


def test_inference_takes_over_the_system_message_of_the_training(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def encode_prompt(encoder: Encoder, messages: Any) -> Any:
        asked.append(encoder.render(messages, add_generation_prompt=True))
        return encoder.tokenize(asked[-1])

    monkeypatch.setattr(Encoder, "encode_prompt", encode_prompt)
    for given, expected in ((None, "You are terse."), ("Be kind.", "Be kind."), ("", None)):
        chat = Chat(InferConfig(adapters=str(tuned), system=given, max_new_tokens=1))
        chat.answer([{"role": "user", "content": "Who?"}])
        assert ("<|im_start|>system" in asked[-1]) == (expected is not None)
        assert (expected or "") in asked[-1]
        assert ("that of the training" in capsys.readouterr().err) == (given is None)
    chat.answer([{"role": "system", "content": "Own."}, {"role": "user", "content": "Who?"}])
    assert "Own." in asked[-1]


def test_an_answer_ends_with_the_positions_of_the_model(model: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=6400, n_positions=40, n_embd=16, n_layer=1, n_head=2
    )
    config.architectures = ["GPT2LMHeadModel"]
    folder = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    chat = Chat(InferConfig(model=str(folder), template="chatml", max_new_tokens=100))
    chat.answer([{"role": "user", "content": "Who?"}])
    with pytest.raises(SftcoreError, match="tokens, and the model 40 positions; shorten it"):
        chat.answer([{"role": "user", "content": "Who? " * 40}])


def test_a_folder_for_answers_that_is_missing_is_told_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompts", "none.txt", "--output", str(tmp_path / "none" / "a.jsonl")]
    assert main(["infer", "--model", "none", *words]) == 2
    assert f"the folder {tmp_path / 'none'} does not exist" in capsys.readouterr().err


def test_a_tokenizer_that_the_model_does_not_know_is_told(model: Path) -> None:
    encoder = Encoder.from_pretrained(model, template="chatml")
    config = load_settings(model)
    assert check_vocabulary(encoder, config) is None
    config.vocab_size = encoder.vocab_size - 1
    warning = check_vocabulary(encoder, config)
    assert warning is not None
    assert f"has 6,400 ids, and the model knows {encoder.vocab_size - 1:,}" in warning
    config.vocab_size = 2
    with pytest.raises(ConfigError, match="the token that ends an answer has the id 2; expected"):
        check_vocabulary(encoder, config)


def test_every_kernel_of_transformers_is_known_by_its_name(model: Path) -> None:
    config = load_settings(model)
    for name in ("sdpa", "eager"):
        assert choose_attention(name, config, torch.float32, training=True).name == name
    with pytest.raises(ConfigError, match="did you mean flex_attention"):
        choose_attention("flex_atention", config, torch.float32, training=True)
