"""The command line: exit codes, messages, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sftcore.cli import main
from sftcore.config import TrainConfig, build, read_yaml

GOOD = '{"query": "Who?", "response": "Me."}\n'


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sftcore", *words], capture_output=True, text=True, check=False
    )


def test_help_and_import_are_light() -> None:
    heavy = "{'torch', 'transformers', 'numpy.random', 'yaml', 'matplotlib'}"
    code = (
        "import sys, sftcore, sftcore.cli\n"
        "try: sftcore.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    assert result.stdout.splitlines()[-1] == "[]"
    # 0.1 s on an idle machine; the bound leaves room for a busy one
    assert seconds < 2


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == "sftcore 0.1.0\n"


@pytest.mark.parametrize("command", ["train", "sft", "infer", "merge"])
def test_help_teaches_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert "example:" in result.stdout
    if command == "train":
        assert "--learning_rate X" in result.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["train", "--lora-rnk", "4"], "error: unknown flag --lora_rnk; did you mean --lora_rank?"),
        (
            ["train", "--model", "m", "--dataset", "d", "--learning-rate", "-1"],
            "error: --learning_rate -1.0 is out of range: expected a number > 0",
        ),
        (
            ["train", "--model", "m", "--dataset", "d", "--lora_rank", "x"],
            "error: command line: lora_rank is 'x'; expected int",
        ),
        (
            ["sft", "--model", "m"],
            "error: --dataset is missing: Files, folders, globs, names (sftcore datasets list), hub ids, URLs or - "
            "(stdin); #N at the end draws N rows.",
        ),
        (
            ["train", "--model", "m", "--dataset", "d", "--tuner_type", "full", "--lora_rank", "4"],
            "error: --lora_rank has no effect without --tuner_type lora, sora, loha, lokr, hra or miss",
        ),
        (
            ["infer", "--model", "m", "--prompt", "a", "--prompts", "b"],
            "error: --prompt and --prompts exclude each other",
        ),
        (
            ["infer", "--model", "m", "--output", "b"],
            "error: --output has no effect without --prompts",
        ),
    ],
)
def test_a_usage_error_is_exit_code_2_and_one_line(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[0] == text


def test_an_unknown_key_of_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: d\nlearning_rat: 1\n")
    assert main(["train", "--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        f'error: {path}: unknown setting "learning_rat"; did you mean learning_rate?\n'
    )


def test_a_mapping_in_a_file_is_the_json_of_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: [a.jsonl]\ncolumns:\n  ask: query\n  reply: response\n")
    config = build(TrainConfig, read_yaml(path), origin=str(path))
    assert config.column_names == {"ask": "query", "reply": "response"}
    flags = build(
        TrainConfig, {**read_yaml(path), "columns": "ask=query,reply=response"}, origin="x"
    )
    assert flags.column_names == config.column_names


def test_flags_stand_before_the_file(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from sftcore.cli.flags import read_flags
    from sftcore.cli.main import _parser
    from sftcore.config import TrainConfig

    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: [a, b]\nlora_rank: 4\nlearning_rate: 1e-4\n")
    parser, _ = _parser()
    words = ["train", "--config", str(path), "--lora_rank", "16", "--dataset", "x,y", "z"]
    config = read_flags(TrainConfig, parser.parse_args(words))
    assert (config.lora_rank, config.dataset, config.learning_rate) == (16, ["x", "y", "z"], 1e-4)


def test_show_marks_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    assert main(["data", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "query/response, 68 characters, 13 trained" in shown
    assert "<|im_start|>assistant\n«Me.<|im_end|>»\n" in shown


def test_show_counts_the_tokens_of_a_model(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    model = shared_data / "tokenizers" / "qwen3"
    assert main(["data", "show", str(path), "--model", str(model)]) == 0
    assert " tokens" in capsys.readouterr().out


def test_a_wrong_file_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "{")
    assert main(["data", "show", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {path}:2:1: not JSON: EOF while parsing an object\n"
    )


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert "sftcore       0.1.0" in capsys.readouterr().out


def test_templates_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["templates", "list"]) == 0
    listed = capsys.readouterr().out
    assert "qwen3 " in listed
    assert "Llama 3 Instruct." in listed
    assert main(["templates", "show", "gemma"]) == 0
    shown = capsys.readouterr().out
    assert "generation prompt: '<start_of_turn>model\\n'" in shown
    assert "closes an answer at the end of a chat with: <end_of_turn>\n" in shown
    assert "closes an answer inside a chat with: <end_of_turn>\n" in shown
    assert "calls: the template does not render them" in shown
    assert "<start_of_turn>model\n«4<end_of_turn>»" in shown
    assert main(["templates", "show", "qwen3"]) == 0
    shown = capsys.readouterr().out
    assert "plain chats by the compiled form" in shown
    assert "'</think>'" in shown
    assert "begin or end with '\\n'" in shown
    assert main(["templates", "show"]) == 2
    assert "name a template" in capsys.readouterr().err
