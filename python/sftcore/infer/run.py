"""`infer`: one question, a file of questions, or a chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sftcore.config import InferConfig
from sftcore.data.prompts import Message, read_prompts, user_message
from sftcore.errors import ConfigError, SftcoreError
from sftcore.infer.generate import Chat
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
    if config.output and not Path(config.output).parent.is_dir():
        folder = Path(config.output).parent
        raise ConfigError(f"--output {config.output}: the folder {folder} does not exist; make it")
    if config.prompt is not None:
        questions = [[user_message(config.prompt)]]
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


def _write_answers(path: Path, answers: list[dict[str, Any]]) -> None:
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
            messages.append(user_message(text))
            try:
                response = chat.answer(
                    system + messages,
                    on_text=lambda piece: print(piece, end="", flush=True),  # noqa: T201
                )
            except SftcoreError as error:
                # the conversation goes on without the question, or anew with /clear
                print(f"error: {error}", file=sys.stderr)  # noqa: T201
                messages.pop()
                continue
            print(flush=True)  # noqa: T201
            messages.append({"role": "assistant", "content": response})
