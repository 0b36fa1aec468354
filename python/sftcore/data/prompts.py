"""Questions in files to conversations that end with a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftcore.errors import RowError

Message = dict[str, Any]


def user_message(text: str) -> Message:
    """Returns the text as a message of the user."""
    return {"role": "user", "content": text}


def read_prompts(path: Path) -> list[list[Message]]:
    """Reads questions: a line each of a text file, or `query` or `messages` of each jsonl row.

    Raises:
        FileNotFoundError: There is no such file.
        RowError: A row has neither or ends before a question, or there are none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(
            f"{path}: not UTF-8: {error.reason}; save it as UTF-8", path=str(path)
        ) from error
    questions: list[list[Message]] = []
    # a prompt may hold the other characters that splitlines() takes for ends of lines
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            questions.append([user_message(line)])
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(
                f"{path}:{number}: not JSON: {error.msg}", path=str(path), line=number
            ) from error
        question = _question(row)
        if not question:
            raise RowError(
                f'{path}:{number}: a prompt has neither "query" nor "messages" with a question; expected a text, or '
                "messages with one that is not of the assistant",
                path=str(path),
                line=number,
            )
        questions.append(question)
    if not questions:
        raise RowError(f"{path}: the file has no prompts", path=str(path))
    return questions


def _question(row: Any) -> list[Message]:
    """Returns the messages of a row up to its last question; none where it has no question."""
    if not isinstance(row, dict):
        return []
    messages = row.get("messages")
    if not isinstance(messages, list):
        return [user_message(row["query"])] if isinstance(row.get("query"), str) else []
    if not all(isinstance(message, dict) for message in messages):
        return []
    asked = [n for n, message in enumerate(messages) if message.get("role") != "assistant"]
    return messages[: asked[-1] + 1] if asked else []
