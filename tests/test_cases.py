"""What is trained, on small rows that went wrong once: spans, stops, and what a template leaves out.

The rows are those of `../shared/cases`, the templates and tokenizers those of the shared data. A trained stretch is
shown as `«…»`.
"""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftcore.data import BatchLoader, Encoder
from sftcore.errors import RowError, SftcoreError, TemplateError

THINKERS = ["Qwen-QwQ-32B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"]
# answers of these end with no token anywhere
ENDLESS = [
    "hfjs-upstage-SOLAR-10.7B-Instruct-v1.0",
    "hfjs-maywell-PiVoT-MoE",
    "vllm-template_alpaca",
    "vllm-template_falcon",
    "vllm-template_falcon_180b",
    "vllm-template_baichuan",
    "ollama-granite-code-3b",
    "ort-nvidia-mistral",
    "axolotl-llava",
    "chujiezheng-amberchat",
    "chujiezheng-chatqa",
]
FAMILIES = re.compile(
    "qwen|llama|mistral|mixtral|gemma|deepseek|glm|gpt-oss|command|granite|phi|smollm|nemotron|kimi|lfm|minimind",
    re.I,
)
# those that leave out all that a turn of the rows says, and a guardian that shows its last question alone
NOT_TO_BE_TOLD = {
    "axolotl-command_a",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "hfjs-HuggingFaceTB-SmolVLM-Instruct",
    "ollama-deepcoder-14b",
    "ollama-deepseek-r1-8b",
    "ollama-deepseek-v2.5-236b",
    "ollama-granite3-guardian-2b",
}


@pytest.fixture(scope="module")
def native(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer that knows the control tokens of all shared templates."""
    folder = tmp_path_factory.mktemp("native") / "tokenizer"
    tool = shared_data / "tools" / "native_tokenizer.py"
    arguments = [shared_data / "tokenizers" / "smollm2", folder, shared_data / "templates"]
    subprocess.run([sys.executable, tool, *arguments], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> Path:
    folder = shared_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"needs the shared cases ({folder})")
    return folder


def rows_of(cases: Path, name: str) -> list[dict[str, Any]]:
    lines = (cases / name / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def with_template(native: Path, shared_data: Path, name: str, **settings: Any) -> Encoder:
    path = shared_data / "templates" / f"{name}.jinja"
    return _opened(native, **settings).with_template(str(path))


@functools.cache
def _opened(native: Path, **settings: Any) -> Encoder:
    return Encoder.from_pretrained(native, template="chatml", **settings)


def marked(encoder: Encoder, row: Any) -> str:
    example = encoder.encode(row)
    text = example.text.encode()
    pieces = [(text[start:end].decode(), trained) for start, end, trained in example.segments]
    return "".join(f"«{piece}»" if trained else piece for piece, trained in pieces)


@pytest.mark.parametrize("name", THINKERS)
def test_a_row_has_one_mask_whatever_came_before(
    native: Path, shared_data: Path, cases: Path, tmp_path: Path, name: str
) -> None:
    rows = rows_of(cases, "mask-state") * 3
    encoder = with_template(native, shared_data, name)
    for number, row in enumerate(rows):
        assert f"<think>\n«ok {number % 8}<" in marked(encoder, row)
        trained = [token.weight > 0 for token in encoder.explain(row)]
        assert trained == encoder.encode(row).loss_mask.tolist()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    loader = BatchLoader([file], encoder, batch_size=4, return_tensors="np", seed=3)
    assert sum(int((batch["labels"] != -100).sum()) for batch in loader) == sum(
        int(encoder.encode(row).loss_mask.sum()) for row in rows
    )


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen3-0.6B",
        "Qwen-QwQ-32B",
        "deepseek-ai-DeepSeek-V3.1",
        "GLM-4.6",
        "openai-gpt-oss-120b",
        "HuggingFaceTB-SmolLM3-3B",
        "mistralai-Mistral-Nemo-Instruct-2407",
        "meta-llama-Llama-3.1-8B-Instruct",
    ],
)
def test_masks_do_not_depend_on_order_or_threads(
    native: Path, shared_data: Path, cases: Path, name: str
) -> None:
    names = [
        "mask-state",
        "turn-start",
        "stop-token",
        "lost-content",
        "refused-agent",
        "dropped-answer",
    ]
    rows = [row for case in names for row in rows_of(cases, case)]
    alone: dict[int, tuple[list[int], list[bool]]] = {}
    for number, row in enumerate(rows):
        try:
            example = with_template(native, shared_data, name).encode(row)
        except SftcoreError:
            continue
        alone[number] = (example.input_ids.tolist(), example.loss_mask.tolist())
    order = [number for number in alone for _ in range(4)]
    random.Random(0).shuffle(order)
    for threads in (1, 8):
        encoder = with_template(native, shared_data, name, num_threads=threads)
        for number, example in zip(
            order, encoder.encode_batch([rows[number] for number in order]), strict=True
        ):
            assert (example.input_ids.tolist(), example.loss_mask.tolist()) == alone[number], rows[
                number
            ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "Qwen-Qwen3-0.6B",
            [
                "<think>\n\n</think>\n\n«2<|im_end|>»",
                "assistant\n«<think>\n\n</think>\n\n2<|im_end|>»",
                "assistant\n«<think>\none and one\n</think>\n\n2<|im_end|>»",
                "assistant\n«<think>\n\n</think>\n\n2<|im_end|>»",
            ],
        ),
        (
            "GLM-4.6",
            [
                "<|assistant|>\n<think></think>«\n2»",
                "<|assistant|>«\n<think></think>\n2»",
                "<|assistant|>«\n<think>one and one</think>\n2»",
                "<|assistant|>«\n<think></think>\n2»",
            ],
        ),
        (
            "HuggingFaceTB-SmolLM3-3B",
            ["assistant\n<think>\n\n</think>\n«2<|im_end|>»", "assistant\n«2<|im_end|>»"],
        ),
        (
            "deepseek-ai-DeepSeek-V3.1",
            [None, "<think>«</think>2<", None, "<think>«</think>2<"],
        ),
    ],
)
def test_a_turn_begins_where_the_prompt_of_its_own_arguments_ends(
    native: Path, shared_data: Path, cases: Path, name: str, expected: list[str | None]
) -> None:
    encoder = with_template(native, shared_data, name)
    for row, text in zip(rows_of(cases, "turn-start"), expected, strict=False):
        if text is None:
            continue
        assert text in marked(encoder, row)
        prompted = Encoder.from_pretrained(
            native,
            template=str(shared_data / "templates" / f"{name}.jinja"),
            chat_template_kwargs=row["chat_template_kwargs"],
        ).render(row["messages"][:1], add_generation_prompt=True)
        example = encoder.encode(row)
        start = next(start for start, _, trained in example.segments if trained)
        given = example.text.encode()[:start].decode()
        assert given == prompted or prompted.startswith(given)


def test_turns_end_with_what_stops_the_model(native: Path, shared_data: Path, cases: Path) -> None:
    chat, agent = rows_of(cases, "stop-token")

    def encoder(name: str, **settings: Any) -> Encoder:
        return with_template(native, shared_data, name, **settings)

    def spans(name: str, row: Any, **settings: Any) -> list[str]:
        return re.findall("«(.*?)»", marked(encoder(name, **settings), row), re.DOTALL)

    assert [span[-10:] for span in spans("openai-gpt-oss-120b", chat)] == [
        "es.<|end|>",
        "<|return|>",
    ]
    assert [span[-8:] for span in spans("openai-gpt-oss-120b", agent)] == ["<|call|>", "return|>"]
    assert [span[-10:] for span in spans("openai-gpt-oss-120b", chat, train_on_eos="last")] == [
        "3 degrees.",
        "<|return|>",
    ]
    assert [span[-8:] for span in spans("openai-gpt-oss-120b", chat, train_on_eos="none")] == [
        "degrees.",
        "Welcome.",
    ]
    for name in ("GLM-4.6", "GLM-4.7-Flash"):
        assert spans(name, chat)[0].endswith("It is 3 degrees.<|user|>")
        assert spans(name, chat)[1].endswith("Welcome.")
        assert spans(name, agent)[0].endswith("</tool_call><|observation|>")
    for name in ("ollama-glm4-9b", "ort-chatglm"):
        assert spans(name, chat)[0].endswith("It is 3 degrees.<|user|>")
    for name in ("vllm-template_chatml", "vllm-template_chatml_2", "hfjs-Qwen-Qwen1.5-72B-Chat"):
        assert spans(name, chat) == ["It is 3 degrees.<|im_end|>", "Welcome."]
        assert encoder(name).encode(chat).endless_turns == 1
        warning = encoder(name).turn_ends.warning
        assert warning is not None
        assert "at the end of a chat" in warning
        appended = encoder(name, append_eos=True)
        assert marked(appended, chat).endswith("«Welcome.<|im_end|>»")
        assert appended.encode(chat).endless_turns == 0


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_said(native: Path, shared_data: Path, cases: Path, name: str) -> None:
    encoder = with_template(native, shared_data, name)
    ends = encoder.turn_ends
    assert (ends.inner, ends.last) == (None, None)
    assert "no answer ends with a token that stops generation" in (ends.warning or "")
    assert encoder.encode(rows_of(cases, "stop-token")[0]).endless_turns == 2


def test_several_tokens_may_close_a_turn(native: Path, tmp_path: Path) -> None:
    row = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    for close, trained in [
        ("<|end|><|im_end|>", "<|end|><|im_end|>"),
        ("\n<|end|>\n<|im_end|>\n", "\n<|end|>\n<|im_end|>"),
        ("<|im_end|><|end|>", "<|im_end|>"),
        (" [end of turn] <|im_end|>", " [end of turn] <|im_end|>"),
    ]:
        path = tmp_path / "template.jinja"
        path.write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}"
            "{% if m.role == 'assistant' %}{{ "
            + json.dumps(close)
            + " }}{% endif %}{{ '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            encoding="utf-8",
        )
        text = marked(Encoder.from_pretrained(native, template=str(path)), row)
        assert f"assistant: «b{trained}»" in text
        assert f"assistant: «d{trained}»" in text


def is_taken(encoder: Encoder, row: Any) -> bool:
    try:
        encoder.encode(row)
    except SftcoreError:
        return False
    return True


def renders(oracle: Any, row: dict[str, Any], source: str) -> bool:
    try:
        oracle.apply_chat_template(
            row["messages"], tools=row.get("tools"), chat_template=source, tokenize=False
        )
    except Exception:  # what a template raises, and what Python does
        return False
    return True


def test_plain_agent_rows_are_taken(native: Path, shared_data: Path, cases: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(native)
    rows = rows_of(cases, "refused-agent") + rows_of(cases, "moved-content")
    refused = []
    known = Encoder.from_pretrained(native, template="chatml")
    for path in sorted((shared_data / "templates").glob("*.jinja")):
        if not FAMILIES.search(path.stem) or path.stem in NOT_TO_BE_TOLD:
            continue
        try:
            encoder = known.with_template(str(path))
        except TemplateError:
            continue
        source = path.read_text(encoding="utf-8")
        refused += [
            f"{path.stem} {number}"
            for number, row in enumerate(rows)
            if not is_taken(encoder, row) and renders(oracle, row, source)
        ]
    assert refused == []


def test_calls_are_trained_and_results_are_not(
    native: Path, shared_data: Path, cases: Path
) -> None:
    row = rows_of(cases, "refused-agent")[1]
    for name in ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "moonshotai-Kimi-K2", "GLM-4.6"):
        spans = re.findall(
            "«(.*?)»", marked(with_template(native, shared_data, name), row), re.DOTALL
        )
        assert len(spans) == 5, name
        assert sum("add" in span for span in spans) == 3, name
        for span, words in zip(spans, ["1", "2", "Both done.", "3", "3."], strict=True):
            assert words in span, (name, span)
            assert "tool_response" not in span


def test_a_message_may_speak_in_several_places(shared_data: Path, cases: Path) -> None:
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "gemma4")
    text = marked(encoder, rows_of(cases, "moved-content")[0])
    spans = re.findall("«(.*?)»", text, re.DOTALL)
    said = "".join(spans)
    for words in ("get_booking", "K7", "Let me look.", "It is not.", "Bye."):
        assert words in said
    assert "insured" not in said
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(
        shared_data / "tokenizers" / "gemma4"
    )
    messages = rows_of(cases, "moved-content")[0]["messages"]
    assert text.replace("«", "").replace("»", "") == oracle.apply_chat_template(
        messages, tokenize=False
    )


def test_what_a_template_leaves_out_is_named(
    native: Path, shared_data: Path, cases: Path, tmp_path: Path
) -> None:
    qwen = Encoder.from_pretrained(shared_data / "tokenizers" / "qwen3")
    developer, thought = rows_of(cases, "lost-content")
    assert qwen.encode(developer).lost == ["the content of messages[0] (developer)"]
    assert qwen.encode(thought).lost == ["the reasoning of messages[1] (assistant)"]
    file = cases / "lost-content" / "rows.jsonl"
    report = BatchLoader([file], qwen, batch_size=1, return_tensors="np").report
    assert [(lost["kind"], lost["rows"], lost["first"]) for lost in report["lost"]] == [
        ("words of developer", 1, f"{file}:1"),
        ("reasoning of assistant", 1, f"{file}:2"),
    ]
    raising = Encoder.from_pretrained(shared_data / "tokenizers" / "qwen3", on_lost_content="raise")
    with pytest.raises(
        TemplateError, match=r"leaves out the content of messages\[0\] \(developer\)"
    ):
        raising.encode(developer)
    skipping = Encoder.from_pretrained(shared_data / "tokenizers" / "qwen3", on_lost_content="skip")
    with pytest.raises(RowError, match="on_lost_content skip"):
        skipping.encode(thought)
    mixed = tmp_path / "mixed.jsonl"
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    mixed.write_text(file.read_text(encoding="utf-8") + json.dumps(plain), encoding="utf-8")
    report = BatchLoader([mixed], skipping, batch_size=1, return_tensors="np").report
    assert (report["rows"], report["lossy"], report["examples"]) == (3, 2, 1)

    words, calls = rows_of(cases, "dropped-answer")
    llama = with_template(native, shared_data, "meta-llama-Llama-3.1-8B-Instruct")
    assert llama.encode(words).lost == ["the content of messages[1] (assistant)"]
    assert with_template(native, shared_data, "openai-gpt-oss-120b").encode(calls).lost == [
        "messages[1].tool_calls[1]"
    ]
    distilled = with_template(native, shared_data, "deepseek-ai-DeepSeek-R1-Distill-Llama-8B")
    with pytest.raises(TemplateError, match=r"all that messages\[1\] says"):
        distilled.encode(calls)


def test_weights_and_turns_of_agents_are_those_of_their_messages(
    native: Path, shared_data: Path, cases: Path
) -> None:
    row = rows_of(cases, "refused-agent")[1]
    row["messages"][1]["loss"] = False
    encoder = with_template(native, shared_data, "Qwen-Qwen3-0.6B")
    spans = re.findall("«(.*?)»", marked(encoder, row), re.DOTALL)
    assert len(spans) == 4
    assert np.count_nonzero(encoder.encode(row).loss_mask) > 0
