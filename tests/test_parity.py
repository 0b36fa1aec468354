"""Text, ids and mask equal Transformers' own, on every row of the real files.

The oracle converts rows by itself (plain Python below) and asks `apply_chat_template` of the same
tokenizer, for the mask with a template whose assistant part is tagged by hand.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sftcore.data import Encoder
from sftcore.errors import SftcoreError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# the template of SmolLM2-Instruct with its assistant part tagged; all else is unchanged
TAGGED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{% if message['role'] == 'assistant' %}"
    "{{'<|im_start|>assistant\n'}}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# every file of the shared data that is in one of the known shapes
FILES = [
    "alpaca-chinese/zh-data-part-00.json",
    "alpaca_eval/gpt-4o-2024-05-13_outputs.json",
    "axolotl_fixtures/conversation.json",
    "codealpaca/code_alpaca_2k.json",
    "data-juicer/arxiv.jsonl",
    "data-juicer/stack_exchange.jsonl",
    "emollm/aiwei.jsonl",
    "emollm/ruozhiba_format_emo.jsonl",
    "fastchat/dummy_conversation.json",
    "firefly/dummy_data.jsonl",
    "gpteacher/roleplay.json",
    "gsm8k/train.jsonl",
    "huatuo/llama_data.json",
    "llamafactory/alpaca_en_demo.json",
    "llamafactory/alpaca_zh_demo.json",
    "llamafactory/c4_demo.jsonl",
    "llamafactory/glaive_toolcall_en_demo.json",
    "llamafactory/glaive_toolcall_zh_demo.json",
    "llamafactory/identity.json",
    "llamafactory/v1_sft_demo.jsonl",
    "llamafactory/wiki_demo.txt",
    "self-llm/huanhuan.jsonl",
    "xtuner/openai_sft.jsonl",
    "xtuner/qwen35_tokenize_data.jsonl",
]
# rows that no template can take: an empty answer, or an image
REFUSED = {
    "alpaca-chinese/zh-data-part-00.json": 6,
    "codealpaca/code_alpaca_2k.json": 2,
    "xtuner/qwen35_tokenize_data.jsonl": 5,
}
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


def read_rows(path: Path) -> list:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [{"text": line.rstrip()} for line in text.split("\n") if line.strip()]
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def flat(content) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", part.get("value")) for part in content)
    return content


def to_messages(row):
    """The oracle's own reading of a row: (messages, untrained positions), or a text."""
    if isinstance(row, list):
        row = {"messages": row}
    if "text" in row:
        return row["text"], set()
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    untrained = set()
    if "messages" in row or "conversations" in row:
        for message in row.get("messages") or row["conversations"]:
            role = message.get("role") or message["from"]
            content = flat(message["content"] if "content" in message else message["value"])
            if message.get("loss", message.get("loss_weight", 1)) in (0, False):
                untrained.add(len(messages))
            if message.get("tool_calls"):
                calls = [
                    json.dumps(c["function"], ensure_ascii=False, separators=(",", ":"))
                    for c in message["tool_calls"]
                ]
                content = "\n".join(([content] if content else []) + calls)
            messages.append({"role": ROLES.get(role, role), "content": content})
        return messages, untrained
    for turn in row.get("conversation") or []:
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        question, answer = ("human", "assistant") if "human" in turn else ("input", "output")
        messages += [
            {"role": "user", "content": turn[question]},
            {"role": "assistant", "content": turn[answer]},
        ]
    if "conversation" in row:
        return messages, untrained
    for turn in row.get("history") or []:
        question, answer = turn.values() if isinstance(turn, dict) else turn
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    answer = next(row[k] for k in ("response", "answer", "output") if k in row)
    if "instruction" in row:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    else:
        question = next(row[k] for k in ("query", "question") if k in row)
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return messages, untrained


@pytest.fixture(scope="module")
def oracle(shared_data: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(
        shared_data / "tokenizers" / "smollm2"
    )


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


@pytest.mark.parametrize("name", FILES)
def test_text_ids_and_mask_equal_transformers(
    name: str, shared_data: Path, encoder: Encoder, oracle
) -> None:
    refused = compared = 0
    for row in read_rows(shared_data / "datasets" / name):
        try:
            example = encoder.encode(row)
        except SftcoreError:
            refused += 1
            continue
        messages, untrained = to_messages(row)
        if isinstance(messages, str):
            text = messages + oracle.eos_token
            ids = oracle(text)["input_ids"]
            mask = [1] * len(ids)
        else:
            text = oracle.apply_chat_template(messages, tokenize=False)
            tagged = oracle.apply_chat_template(
                messages,
                chat_template=TAGGED,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids, mask = tagged["input_ids"], tagged["assistant_masks"]
        assert example.text == text
        assert example.input_ids.tolist() == list(ids)
        if not untrained:
            assert example.loss_mask.astype(int).tolist() == list(mask)
        else:
            assert not np.any(example.loss_mask & ~np.array(mask, dtype=bool))
        compared += 1
    assert refused == REFUSED.get(name, 0)
    assert compared > 0


def test_the_mask_of_a_tagged_template_is_the_one_its_tag_gives(
    shared_data: Path, encoder: Encoder, oracle, tmp_path: Path
) -> None:
    path = tmp_path / "tagged.jinja"
    path.write_text(TAGGED, encoding="utf-8")
    tagged = Encoder.from_pretrained(encoder.folder, template=str(path))
    rows = read_rows(shared_data / "datasets" / "emollm" / "aiwei.jsonl")[:200]
    for one, other in zip(tagged.encode_batch(rows), encoder.encode_batch(rows), strict=True):
        assert one.text == other.text
        assert np.array_equal(one.loss_mask, other.loss_mask)


def test_the_prompt_of_inference_is_a_prefix_of_what_training_rendered(encoder: Encoder) -> None:
    question = [{"role": "user", "content": "Hi, é 你好"}]
    example = encoder.encode([*question, {"role": "assistant", "content": "Yes"}])
    prompt = encoder.render(question, add_generation_prompt=True)
    assert example.text.startswith(prompt)
    start = next(start for start, _, trained in example.segments if trained)
    assert start == len(prompt.encode())
    assert (
        encoder.encode_prompt(question).tolist()
        == example.input_ids.tolist()[: len(encoder.encode_prompt(question))]
    )


@pytest.mark.parametrize("content", [" a", "a ", "\n\na\n", "{{ x }}", "<|im_end|>b", "é\u0301🙂"])
def test_segments_tile_the_text(encoder: Encoder, content: str) -> None:
    example = encoder.encode(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": content},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": content},
        ]
    )
    at = 0
    for start, end, _ in example.segments:
        assert start == at < end
        at = end
    assert at == len(example.text.encode())
    assert sum(trained for *_, trained in example.segments) == 2
