"""`infer`: one question, a file of questions, or a chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sftcore.config import InferConfig
from sftcore.errors import ConfigError, RowError
from sftcore.infer.generate import Chat, Message
from sftcore.models import quieten

HELP = "/exit leaves, /clear forgets the conversation, /system TEXT sets a system message"


def infer(config: InferConfig) -> list[dict[str, Any]]:
    """Answers as `config` says.

    Returns:
        For each question `messages` and `response`; nothing for an interactive chat.

    Raises:
        SftcoreError: A setting, a row or the checkpoint is wrong.
    """
    quieten()
    if config.prompt is not None:
        questions = [[_user(config.prompt)]]
    elif config.prompts is not None:
        questions = read_prompts(Path(config.prompts))
    else:
        _chat(Chat(config))
        return []
    chat = Chat(config)
    answers = []
    for messages in questions:
        response = chat.answer(messages)
        answers.append({"messages": messages, "response": response})
        if config.prompts is not None and not config.output:
            print(json.dumps(answers[-1], ensure_ascii=False), flush=True)  # noqa: T201
    if config.output:
        _write_answers(Path(config.output), answers)
    return answers


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
            questions.append([_user(line)])
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
            questions.append([_user(row["query"])])
        else:
            raise RowError(
                f'{path}:{number}: a prompt has neither "query" nor "messages"',
                path=str(path),
                line=number,
            )
    if not questions:
        raise RowError(f"{path}: the file has no prompts", path=str(path))
    return questions


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _write_answers(path: Path, answers: list[dict[str, Any]]) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.name}.tmp")
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _chat(chat: Chat) -> None:
    print(HELP, file=sys.stderr)  # noqa: T201
    messages: list[Message] = []
    system: list[Message] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            messages = []
        elif text.startswith("/system"):
            content = text.removeprefix("/system").strip()
            system = [{"role": "system", "content": content}] if content else []
            messages = []
        elif text.startswith("/"):
            print(HELP, file=sys.stderr)  # noqa: T201
        elif text:
            messages.append(_user(text))
            response = chat.answer(
                system + messages,
                on_text=lambda piece: print(piece, end="", flush=True),  # noqa: T201
            )
            print(flush=True)  # noqa: T201
            messages.append({"role": "assistant", "content": response})
