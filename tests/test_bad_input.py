"""Each kind of bad input, with its whole message: where, what was found, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError, RowError, TemplateError, TokenizerError

GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
)


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=64)


def message(path: Path, text: str | bytes, encoder: Encoder, error: type[Exception]) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error) as caught:
        BatchLoader(path, encoder, return_tensors="np")
    return str(caught.value).replace(str(path), path.name)


@pytest.mark.parametrize(
    ("second_row", "expected"),
    [
        (
            '{"messages": [}',
            "rows.jsonl:2:15: not JSON: expected value",
        ),
        (
            '{"id": 7}',
            "rows.jsonl:2: a row with the keys id is in none of the known shapes; expected messages, "
            "conversations, instruction+output, query+response or text",
        ),
        (
            '{"text": "a document"}',
            "rows.jsonl:2: a row of shape plain text in a file whose first row is messages; one file "
            "holds one shape, split it",
        ),
        (
            '{"messages": []}',
            'rows.jsonl:2:14: "messages" is an empty list; remove the row',
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "narrator", "content": "x"}]}',
            'rows.jsonl:2:58: messages[1].role is "narrator"; expected system, user (human), '
            "assistant (gpt, bot), tool (observation, tool_response) or function_call",
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}',
            "rows.jsonl:2:82: messages[1] is an empty assistant turn, which would teach the model to say "
            'nothing; fill it, remove it, or set "loss": false on it',
        ),
        (
            '{"messages": [{"role": "user", "text": "q"}]}',
            'rows.jsonl:2:15: messages[0] has no "content" (found keys: role, text); rename the key to '
            "content or value",
        ),
        (
            '{"messages": [{"role": "user", "content": "é 你"}, {"role": "assistant", "content": 3}]}',
            "rows.jsonl:2:84: messages[1] has content that is a number; expected a string",
        ),
        (
            '{"messages": [{"role": "user", "content": "q"}]}',
            'rows.jsonl:2:14: "messages" has no assistant turn to train on (roles: user)',
        ),
        (
            b'{"messages": "\xff"}',
            "rows.jsonl:2:15: byte 0xff is not UTF-8; convert the file, for example with iconv -t UTF-8",
        ),
    ],
)
def test_a_wrong_row_is_named_by_place_finding_and_remedy(
    tmp_path: Path, encoder: Encoder, second_row: str | bytes, expected: str
) -> None:
    second = second_row if isinstance(second_row, bytes) else second_row.encode()
    text = GOOD.encode() + b"\n" + second + b"\n" + GOOD.encode()
    assert message(tmp_path / "rows.jsonl", text, encoder, RowError) == expected


def test_a_wrong_row_of_a_json_array_is_named_by_its_line(tmp_path: Path, encoder: Encoder) -> None:
    rows = [json.loads(GOOD), {"messages": [{"role": "user", "content": "q"}, {"role": "x"}]}]
    text = json.dumps(rows, indent=1)
    line = 1 + text[: text.index('"role": "x"')].count("\n") - 1
    assert message(tmp_path / "rows.json", text, encoder, RowError) == (
        f'rows.json:{line}:4: messages[1] has no "content" (found keys: role); rename the key to '
        "content or value"
    )


def test_an_array_that_was_cut_off_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    text = f"[{GOOD},\n{GOOD[:30]}"
    assert message(tmp_path / "rows.json", text, encoder, RowError) == (
        "rows.json:2: the file ends inside the row that begins on line 2; it was cut off, write it "
        "again"
    )


def test_a_row_over_max_length_is_refused_where_asked(tmp_path: Path, shared_data: Path) -> None:
    encoder = Encoder.from_pretrained(
        shared_data / "tokenizers" / "smollm2", max_length=16, truncation_strategy="raise"
    )
    assert message(tmp_path / "rows.jsonl", GOOD, encoder, RowError) == (
        "rows.jsonl:1: 34 tokens are over max_length 16; raise --max_length, or choose "
        "--truncation_strategy delete, left, right or split"
    )


def test_rows_deleted_for_their_length_are_counted_with_the_first_place(
    tmp_path: Path, encoder: Encoder
) -> None:
    path = tmp_path / "rows.jsonl"
    long = GOOD.replace('"a"', json.dumps("word " * 100))
    path.write_text("\n".join([GOOD, long, long, GOOD]))
    report = BatchLoader(path, encoder, return_tensors="np").report
    assert (report["rows"], report["examples"], report["deleted"]) == (4, 2, 2)
    assert report["first_deleted"] == f"{path}:2"


def test_all_rows_deleted_is_an_error(tmp_path: Path, shared_data: Path) -> None:
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", max_length=16)
    assert message(tmp_path / "rows.jsonl", GOOD, encoder, RowError) == (
        "none of the 1 rows is left to train on: 1 are over max_length 16 (the first: rows.jsonl:1; "
        "raise --max_length or choose --truncation_strategy left, right or split)"
    )


def test_a_cut_that_leaves_nothing_to_train_is_refused(tmp_path: Path, shared_data: Path) -> None:
    encoder = Encoder.from_pretrained(
        shared_data / "tokenizers" / "smollm2", max_length=16, truncation_strategy="right"
    )
    assert message(tmp_path / "rows.jsonl", GOOD, encoder, RowError) == (
        "rows.jsonl:1: cutting 34 tokens to max_length 16 leaves no trained token; raise --max_length, "
        "or choose --truncation_strategy delete"
    )


def test_an_empty_file_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    assert message(tmp_path / "rows.jsonl", " \n\n", encoder, RowError) == (
        "rows.jsonl: the file has no rows; check that it was written whole"
    )


def test_a_missing_file_is_file_not_found(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(FileNotFoundError) as caught:
        BatchLoader(path, encoder)
    assert str(caught.value) == (
        f"{path}: no such file or folder; check the path, or name a data set of sftcore datasets list"
    )


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, encoder: Encoder) -> None:
    assert message(tmp_path / "rows.md", "a,b", encoder, RowError) == (
        'rows.md: a file of kind ".md"; expected .jsonl, .ndjson, .json, .csv, .tsv or .txt (each also '
        "with .gz or .zst after it), or .parquet"
    )


def test_utf16_is_named(tmp_path: Path, encoder: Encoder) -> None:
    assert message(tmp_path / "rows.jsonl", GOOD.encode("utf-16"), encoder, RowError) == (
        "rows.jsonl:1: the file is UTF-16; convert it with iconv -f UTF-16 -t UTF-8"
    )


def test_a_tokenizer_without_chat_template_says_what_to_pass(
    tmp_path: Path, shared_data: Path
) -> None:
    encoder = Encoder.from_pretrained(shared_data / "tokenizers" / "gpt2")
    assert message(tmp_path / "rows.jsonl", GOOD, encoder, TemplateError) == (
        "rows.jsonl:1: the tokenizer has no chat template, so a chat cannot be rendered; pass --template "
        "default (for a base model), --template chatml or a .jinja file"
    )


def test_a_template_that_raises_is_quoted(tmp_path: Path, shared_data: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{% if true %}\n{{ raise_exception('no user turn, please') }}{% endif %}")
    encoder = Encoder.from_pretrained(
        shared_data / "tokenizers" / "smollm2", template=str(template)
    )
    assert message(tmp_path / "rows.jsonl", GOOD, encoder, TemplateError) == (
        "rows.jsonl:1: the chat template refuses this conversation: no user turn, please (line 2 of the "
        "template)"
    )


def test_a_template_that_does_not_compile_names_its_line(tmp_path: Path, shared_data: Path) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text("{{ messages }}\n{% for message in %}")
    with pytest.raises(TemplateError, match=r"does not compile: line 2: "):
        Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", template=str(template))


def test_a_broken_tokenizer_says_how_to_save_it_again(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: not a tokenizer\.json .*save_pretrained"
    ):
        Encoder.from_pretrained(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; convert it once with"):
        Encoder.from_pretrained(tmp_path)


def test_an_unknown_template_lists_the_known_ones(shared_data: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'template "nope" is unknown; expected auto, one of .*chatml'
    ):
        Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2", template="nope")


def test_skipped_rows_are_counted_and_quoted(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"id": 1}}\nnot json\n{GOOD}\n')
    loader = BatchLoader(path, encoder, on_bad_row="skip", return_tensors="np")
    assert (loader.num_rows, loader.report["bad"]) == (2, 2)
    assert [text.split(": ")[0] for text in loader.report["first_bad"]] == [
        f"{path}:2",
        f"{path}:3:2",
    ]


def test_a_file_that_changes_while_in_use_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n")
    loader = BatchLoader(path, encoder, return_tensors="np")
    path.write_text(f"{GOOD}\n{GOOD}\n".replace('"a"', '"b"'))
    with pytest.raises(RowError, match="changed while it was in use"):
        list(loader)
