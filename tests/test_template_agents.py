"""Every shared template on rows of agents, with arguments: the text of Transformers, or an error of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftcore._core import Template  # noqa: TID251  the renderer without a tokenizer
from sftcore.errors import SftcoreError

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

SPECIAL = [("bos_token", "<s>"), ("eos_token", "</s>")]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"thinking": True},
    {"reasoning_effort": "high"},
]
# of masks, not of the text: a row of which nothing but the end would be trained
OF_MASKS = ("so that nothing but its end would be trained", "cannot tell which text")


def _rows(cases: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(cases.glob("*/rows.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if isinstance(row, dict) and "messages" in row:
                rows.append(row)
    return rows


def _expected(row: dict[str, Any], source: str, arguments: dict[str, Any]) -> str | None:
    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in row["messages"]
    ]
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[messages],
            tools=row.get("tools"),
            chat_template=source,
            **dict(SPECIAL),
            **arguments,
        )
    except Exception:  # what a template raises, and what Python does
        return None
    return str(texts[0])


def test_rows_of_agents_are_the_text_of_transformers_or_refused_by_both(shared_data: Path) -> None:
    cases = shared_data.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"needs the shared cases ({cases})")
    rows = _rows(cases)
    wrong, same, refused = [], 0, 0
    for path in sorted((shared_data / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        try:
            template = Template(source, SPECIAL)
        except SftcoreError as error:
            # the one refusal that is meant (docs/templates.md)
            if "it adds text to the result of |safe" in str(error):
                continue
            template = None
        for number, row in enumerate(rows):
            # without a place for calls, they become text here
            if "tool_calls" not in source and any("tool_calls" in each for each in row["messages"]):
                continue
            for arguments in ARGUMENTS:
                given = {**(row.get("chat_template_kwargs") or {}), **arguments}
                try:
                    line = json.dumps({**row, "chat_template_kwargs": given}).encode()
                    text = None if template is None else template.render_row(line)[0]
                except SftcoreError as error:
                    if any(words in str(error) for words in OF_MASKS):
                        continue
                    text = None
                expected = _expected(row, source, given)
                same += text is not None and text == expected
                refused += text is None and expected is None
                if text != expected:
                    wrong.append((path.name, number, arguments))
    assert wrong == []
    assert same > 5000
    assert refused > 100
