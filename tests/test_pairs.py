"""Tokenizers with templates, beside Transformers; a part of `make parity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from agent_parity import run_agents, table
from parity import conversations, open_tokenizer, run
from sftcore.data import Encoder
from sftcore.errors import SftcoreError

# no row may be refused with templates of these families
FAMILIES = ("qwen", "llama", "mistral", "gemma", "smollm", "deepseek", "phi", "glm")
# a part of those that `make parity` runs with native tokenizers
SOME = [
    "GLM-4.6",
    "Qwen-Qwen3-0.6B",
    "deepseek-ai-DeepSeek-V3.1",
    "openai-gpt-oss-120b",
    "mistralai-Mistral-Nemo-Instruct-2407",
]
# but for classifiers, which leave out what the assistant says, and one that adds text to |safe
REFUSED = ("Guard", "guardian", "shieldgemma", "functionary")


@pytest.mark.timeout(900)
def test_every_tokenizer_with_every_template(shared_data: Path) -> None:
    report = run(shared_data, per_file=1, every=11)
    assert not report.differences, str(report)
    assert report.counts["pairs"] > 2500
    assert report.counts["masks"] > 300
    for reason in report.refused:
        name = reason.partition(":")[0]
        is_known = any(known in name for known in REFUSED)
        assert is_known or not any(family in name.lower() for family in FAMILIES), reason


def test_rows_of_agents_with_native_tokenizers(shared_data: Path) -> None:
    if not (shared_data.parent / "cases").is_dir():
        pytest.skip("needs the shared cases")
    checks = run_agents(shared_data, SOME)
    assert not any(check.differences for check in checks), table(checks)
    assert all(check.compared >= len(SOME) for check in checks), table(checks)


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_engines_agree_with_transformers_on_rows_of_every_file(
    shared_data: Path, engine: str
) -> None:
    template = shared_data / "templates" / "Qwen-Qwen3-0.6B.jinja"
    rows = conversations(shared_data, 2)
    for name in ("qwen3", "llama2"):
        folder = shared_data / "tokenizers" / name
        oracle = open_tokenizer(folder)
        encoder = Encoder.from_pretrained(folder, template=str(template), tokenizer_engine=engine)
        for conversation in rows:
            try:
                example = encoder.encode(conversation.row)
            except SftcoreError:
                continue
            ids = oracle(example.text, add_special_tokens=False)["input_ids"]
            assert example.input_ids.tolist() == ids


def test_parts_go_to_templates_that_take_them(shared_data: Path) -> None:
    """Others would print the list, or leave it out; they get the text of the parts."""
    folder = shared_data / "tokenizers" / "smollm2"
    oracle = open_tokenizer(folder)
    encoder = Encoder.from_pretrained(folder)
    contexts = json.loads((shared_data / "templates" / "contexts.json").read_text(encoding="utf-8"))
    messages = contexts["parts"]["messages"]
    same = joined = 0
    for template in sorted((shared_data / "templates").glob("*.jinja")):
        source = template.read_text(encoding="utf-8")
        try:
            text = encoder.with_template(str(template)).render(messages)
        except SftcoreError:
            continue
        try:
            want = oracle.apply_chat_template(messages, chat_template=source, tokenize=False)
        except Exception:
            want = ""
        if text == want:
            same += 1
            continue
        flat = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            for message in messages
        ]
        assert "Hi you" not in want, template.name
        try:
            want = oracle.apply_chat_template(flat, chat_template=source, tokenize=False)
        except Exception:
            continue
        assert text == want, template.name
        joined += 1
    assert same > 30
    assert joined > 40
