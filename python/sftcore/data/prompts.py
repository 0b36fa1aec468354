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
        RowError: A row has neither, or there are none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    questions: list[list[Message]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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
        messages = row.get("messages") if isinstance(row, dict) else None
        if isinstance(messages, list) and messages:
            while messages and messages[-1].get("role") == "assistant":
                messages.pop()
            questions.append(messages)
        elif isinstance(row, dict) and isinstance(row.get("query"), str):
            questions.append([user_message(row["query"])])
        else:
            raise RowError(
                f'{path}:{number}: a prompt has neither "query" nor "messages"',
                path=str(path),
                line=number,
            )
    if not questions:
        raise RowError(f"{path}: the file has no prompts", path=str(path))
    return questions
