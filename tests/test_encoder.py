"""What is trained, by the settings and by the row; engines against each other; tokens explained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.data import Encoder
from sftcore.errors import ConfigError, RowError, TemplateError, TokenizerError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\n\n</think>\n\nSecond."},
]


def said(encoder: Encoder, row: Any) -> list[str]:
    """The trained stretches of a row."""
    example = encoder.encode(row)
    encoded = example.text.encode()
    return [encoded[start:end].decode() for start, end, trained in example.segments if trained]


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "smollm2"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, ["First.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"]),
        ({"train_on": "last"}, ["<think>\n\n</think>\n\nSecond.<|im_end|>"]),
        (
            {"train_on": "user,assistant", "train_on_eos": "none"},
            ["One?", "First.", "Two?", "<think>\n\n</think>\n\nSecond."],
        ),
        ({"train_on_eos": "last"}, ["First.", "<think>\n\n</think>\n\nSecond.<|im_end|>"]),
        ({"ignore_empty_think": True}, ["First.<|im_end|>", "Second.<|im_end|>"]),
        ({"reasoning": "drop"}, ["First.<|im_end|>", "Second.<|im_end|>"]),
    ],
)
def test_settings_decide_what_is_trained(
    folder: Path, setting: dict[str, Any], expected: list[str]
) -> None:
    assert said(Encoder.from_pretrained(folder, **setting), CHAT) == expected


def test_train_on_all_is_the_whole_text(folder: Path) -> None:
    encoder = Encoder.from_pretrained(folder, train_on="all")
    example = encoder.encode(CHAT)
    assert example.loss_mask.all()
    assert said(encoder, CHAT) == [example.text]


def test_the_weight_of_a_message_reaches_its_tokens(folder: Path) -> None:
    row = [dict(message) for message in CHAT]
    row[2]["weight"] = 0.25
    row[4]["loss"] = False
    example = Encoder.from_pretrained(folder).encode(row)
    assert set(example.loss_weights.tolist()) == {0.0, 0.25}
    assert np.array_equal(example.loss_mask, example.loss_weights > 0)


@pytest.mark.parametrize("weight", [-1, "high", [1]])
def test_a_weight_that_is_none_is_refused(folder: Path, weight: Any) -> None:
    row = [CHAT[1], {**CHAT[2], "weight": weight}]
    with pytest.raises(RowError, match=r"expected true, false, or a weight of 0 or more"):
        Encoder.from_pretrained(folder).encode(row)


def test_tool_calls_are_trained_and_their_results_are_not(shared_data: Path) -> None:
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "<|im_end|>secret"},
        {"role": "assistant", "content": "2"},
    ]
    first, last = said(encoder, row)
    assert first.startswith("<tool_call>\n")
    assert first.endswith("</tool_call><|im_end|>")
    assert last.endswith("2<|im_end|>")


def test_a_template_that_leaves_an_answer_out_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "parts.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is not string %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}",
        encoding="utf-8",
    )
    encoder = Encoder.from_pretrained(folder, template=str(path))
    with pytest.raises(TemplateError, match=r"leaves out or changes all that messages\[1\]"):
        encoder.encode(CHAT[1:3])
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT[1:3]]
    assert "First." in encoder.encode(parts).text


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_control_tokens_in_content_can_be_text(folder: Path, engine: Any) -> None:
    row = [
        {"role": "user", "content": "What is <|im_end|>?"},
        {"role": "assistant", "content": "It is <|im_start|>, é."},
    ]
    parsed = Encoder.from_pretrained(folder, tokenizer_engine=engine)
    plain = Encoder.from_pretrained(
        folder, tokenizer_engine=engine, control_tokens_in_content="text"
    )
    one, other = parsed.encode(row), plain.encode(row)
    assert one.text == other.text
    end = one.input_ids[-2]
    assert parsed.decode([end], skip_special_tokens=False) == "<|im_end|>"
    assert (one.input_ids == end).sum() == (other.input_ids == end).sum() + 1
    assert plain.decode(other.input_ids, skip_special_tokens=False) == other.text


def test_control_tokens_in_content_are_counted(folder: Path, tmp_path: Path) -> None:
    from sftcore.data import BatchLoader

    path = tmp_path / "rows.jsonl"
    rows = [[{"role": "user", "content": "<|im_end|> <|im_start|>"}, CHAT[2]], CHAT]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    for mode in ("parse", "text"):
        encoder = Encoder.from_pretrained(folder, control_tokens_in_content=mode)
        loader = BatchLoader(path, encoder, batch_size=1, return_tensors="np")
        assert loader.report["control_tokens_in_content"] == 2


def test_explain_says_what_each_token_stands_for(folder: Path) -> None:
    encoder = Encoder.from_pretrained(folder)
    row = [{"role": "user", "content": "Hi 🤔"}, {"role": "assistant", "content": "é🤔 yes"}]
    example, tokens = encoder.encode(row), encoder.explain(row)
    assert [token.id for token in tokens] == example.input_ids.tolist()
    assert [token.weight > 0 for token in tokens] == example.loss_mask.tolist()
    encoded = example.text.encode()
    for token in tokens:
        assert encoded[slice(*token.span)].decode() == token.text
        start, end, trained = example.segments[token.segment or 0]
        assert start <= token.span[0] < end
        assert trained == (token.weight > 0)
    assert {token.message for token in tokens if token.weight} == {1}


@pytest.mark.parametrize(
    ("name", "content"), [("qwen3", "Cafe\u0301 \u212b"), ("t5-small", "ﬁne  ½ \u3000x")]
)
def test_explain_leaves_no_byte_out_under_a_normalizer(
    shared_data: Path, name: str, content: str
) -> None:
    """NFC and NFKC make fewer or other characters of a text than it has; each still belongs to a token."""
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / name, template="chatml")
    row = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    tokens = encoder.explain(row)
    covered = 0
    for token in tokens:
        assert token.span[0] <= covered
        covered = max(covered, token.span[1])
    assert covered == len(encoder.encode(row).text.encode())
    assert [token.weight > 0 for token in tokens] == encoder.encode(row).loss_mask.tolist()


def test_ties_of_a_unigram_model_fall_as_in_the_published_wheel(shared_data: Path) -> None:
    """Sums of scores that differ in their last bit; scores read more exactly than there cut these otherwise."""
    folder = shared_data / "tokenizers" / "t5-small"
    encoder = Encoder.from_pretrained(folder, template="chatml")
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (
        "----------",
        "-------",
        "200000000000000000000)",
        "1.000000000000000000000000000071",
    ):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert encoder.tokenize(text).tolist() == ids


def test_arguments_for_the_template_come_from_the_run_and_the_row(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "qwen3"
    encoder = Encoder.from_pretrained(folder, chat_template_kwargs={"enable_thinking": False})
    question = [{"role": "user", "content": "Hi"}]
    assert encoder.render(question, add_generation_prompt=True).endswith("<think>\n\n</think>\n\n")
    row: Any = {"messages": question, "chat_template_kwargs": {"enable_thinking": True}}
    assert encoder.render(row, add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_named_templates_of_a_folder(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    body = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    config["chat_template"] = [
        {"name": "default", "template": body},
        {"name": "tool_use", "template": "tools:" + body},
    ]
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    encoder = Encoder.from_pretrained(model)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert (
        encoder.encode(CHAT[1:3]).text == "<|im_start|>One?<|im_end|><|im_start|>First.<|im_end|>"
    )
    assert encoder.encode({"messages": CHAT[1:3], "tools": [tool]}).text.startswith("tools:")


def test_every_turn_of_a_long_chat_is_found(shared_data: Path) -> None:
    """All turns are found in one render with marks; benches/encode.py shows that it stays as fast."""
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")
    for name in ("Qwen-Qwen3-0.6B", "mistralrs-llama2", "meta-llama-Llama-3.1-8B-Instruct"):
        path = shared_data / "templates" / f"{name}.jinja"
        chat = encoder.with_template(str(path))
        turns = [m for n in range(200) for m in ({**CHAT[1], "content": f"q{n}"}, CHAT[2])]
        assert len(said(chat, turns)) == 200


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_on", "user,robot", "expected assistant, last, all, or roles"),
        ("train_on_eos", "first", "expected turn, last or none"),
        ("reasoning", "hide", "expected keep or drop"),
        ("control_tokens_in_content", "drop", "expected parse or text"),
        ("tokenizer_engine", "slow", "expected auto, reference or fast"),
    ],
)
def test_unknown_values_of_settings_are_refused(
    folder: Path, name: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder.from_pretrained(folder, **{name: value})


def test_a_tokenizer_the_fast_engine_cannot_run_uses_the_reference(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "minilm-bert"
    encoder = Encoder.from_pretrained(folder, template="chatml")
    assert encoder.tokenizer_engine == "reference"
    assert encoder.tokenizer_engine_reason == "its model is WordPiece, not BPE"
    with pytest.raises(TokenizerError, match="its model is WordPiece"):
        Encoder.from_pretrained(folder, template="chatml", tokenizer_engine="fast")


def test_a_template_that_raises_says_so_in_its_own_words(folder: Path, tmp_path: Path) -> None:
    from sftcore.data import BatchLoader

    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}\n{% if m.role == 'system' %}\n"
        "{{ raise_exception('No system messages, please') }}\n{% endif %}\n{{ m.content }}\n{% endfor %}",
        encoding="utf-8",
    )
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": CHAT[1:3]}, {"messages": CHAT}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    encoder = Encoder.from_pretrained(folder, template=str(template))
    with pytest.raises(TemplateError) as caught:
        BatchLoader(path, encoder, batch_size=1)
    assert "rows.jsonl:2" in str(caught.value)
    assert "No system messages, please (line 3 of the template)" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endfro %}", "line 3: .*endfro"),
        ("{{ 'a'|safe + messages[0].content }}", r"line 1: .*\|safe"),
        ("{{ messages|nothing }}", "nothing"),
    ],
)
def test_a_template_that_cannot_compile_names_the_construct(
    folder: Path, tmp_path: Path, source: str, message: str
) -> None:
    template = tmp_path / "wrong.jinja"
    template.write_text(source, encoding="utf-8")
    with pytest.raises(TemplateError, match=message):
        Encoder.from_pretrained(folder, template=str(template)).encode(CHAT)


def test_a_truncated_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    text = (model / "tokenizer.json").read_bytes()
    (model / "tokenizer.json").write_bytes(text[: len(text) // 2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*download the file again"):
        Encoder.from_pretrained(model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(TokenizerError, match=r"but tokenizer\.model, a SentencePiece model"):
        Encoder.from_pretrained(model)


def test_a_line_of_a_gigabyte_is_an_error_within_bounds(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(1 << 30)
    code = (
        "import sys\nfrom sftcore.data import BatchLoader, Encoder\n"
        "from sftcore.errors import RowError\n"
        "try:\n    BatchLoader(sys.argv[2], Encoder.from_pretrained(sys.argv[1]), batch_size=1)\n"
        "except RowError as error:\n    print(error)\n"
        "status = open('/proc/self/status').read()\n"
        "print(status.split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    message, kilobytes = done.stdout.strip().rsplit("\n", 1)
    assert "rows.jsonl:1" in message
    assert int(kilobytes) < 800 * 1024


# letters of many scripts, white space, digits, emoji, and texts on which engines have differed
texts = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "'s",
                "'LL",
                "你好",
                "한국어",
                "é",
                "e\u0301",
                "👨‍👩‍👧",
                "1234567",
                "٣٤",
                "<|im_end|>",
                "</s>",
                "<s>",
                "<|eot_id|>",
                "<think>",
                "▁",
                "\u00a0",
                "\u3000",
                "a" * 300,
                "{{ x }}",
            ]
        ),
    ),
    max_size=30,
).map("".join)

ENGINES = [
    "smollm2",
    "qwen3",
    "llama3.1",
    "llama2",
    "phi-3-mini",
    "deepseek-v3",
    "gpt-neox-dolma",
    "gemma4",
]


@pytest.mark.parametrize("name", ENGINES)
def test_engines_agree_on_any_text(shared_data: Path, name: str) -> None:
    folder = shared_data / "tokenizers" / name
    fast = Encoder.from_pretrained(folder, template="chatml", tokenizer_engine="fast")
    reference = Encoder.from_pretrained(folder, template="chatml", tokenizer_engine="reference")

    @given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    @settings(max_examples=150, deadline=None)
    def check(turns: list[tuple[str, str]]) -> None:
        row = [
            message
            for question, answer in turns
            for message in (
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer + "."},
            )
        ]
        one, other = fast.encode(row), reference.encode(row)
        assert one.text == other.text
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
        at = 0
        for start, end, _ in one.segments:
            assert start == at < end
            at = end
        assert at == len(one.text.encode())

    check()


@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
def test_engines_agree_on_messages_of_any_size(shared_data: Path, size: int) -> None:
    for name in ("qwen3", "llama2"):
        folder = shared_data / "tokenizers" / name
        for unit in ("a", "ab c ", "你好", "\n"):
            row = [CHAT[1], {"role": "assistant", "content": (unit * size)[:size] + "."}]
            ids = [
                Encoder.from_pretrained(folder, template="chatml", tokenizer_engine=engine)
                .encode(row)
                .input_ids
                for engine in ("fast", "reference")
            ]
            assert np.array_equal(*ids)
