"""The control tokens that a chat template writes, and those of them that the tokenizer does not know.

In come conversations that are rendered for the look of them, out come names. What stands in the text beside contents is
what the template writes there. Of that, a control token is

- whatever has the form `<|name|>`, `<|name>`, `<name|>`, `<｜name｜>` or `[|name|]`,
- `<name>`, `</name>` or `[NAME]` directly behind what the assistant says, as it closes the turn,
- `<name>` before the content of every message, whoever says it, as it opens turns.

Anything else in angle or square brackets (`<think>`, `<tool_call>`, `[INST]`) is text, which many models read as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftcore.data.encoder import Encoder
from sftcore.errors import SftcoreError

_BARRED = re.compile(
    r"<\|[^\s<>|]{1,60}\|?>|<[^\s<>|]{1,60}\|>|<｜[^\s<>]{1,60}｜>|\[\|[^\s\[\]|]{1,60}\|\]"
)
_CLOSING = re.compile(r"\s*(</?[A-Za-z_][\w.:-]{0,60}>|\[/?[A-Z_]{1,60}\])")
_OPENING = re.compile(r"<[A-Za-z_][\w.:-]{0,60}>")
# words that no template writes
_QUESTIONS, _ANSWERS = ("zqaskoneqz", "zqasktwoqz"), ("zqsayoneqz", "zqsaytwoqz")
_SYSTEM, _RESULT = "zqsystemqz", "zqresultqz"
_CONTENT = re.compile(r"zq[a-z]+qz")


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


_TURNS = [
    _message(role, content)
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
    for role, content in (("user", question), ("assistant", answer))
]
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "zqnameqz", "arguments": {}}}
    ],
}
_TOOL = {"role": "tool", "name": "zqnameqz", "tool_call_id": "call00001", "content": _RESULT}


def control_tokens(encoder: Encoder, *, with_calls: bool = True) -> list[str]:
    """Returns the control tokens that the chat template of an encoder writes, in the order in which they come.

    Conversations that the template refuses are left out.

    Args:
        encoder: With a chat template.
        with_calls: Whether a call and its result are looked at too, beside questions and answers.
    """
    found: dict[str, None] = {}
    for turns in ([_message("system", _SYSTEM), *_TURNS], _TURNS):
        text = _render(encoder, turns) + _render(encoder, turns[:-1], add_generation_prompt=True)
        frames = _CONTENT.split(text)
        contents = _CONTENT.findall(text)
        openings = [set(_OPENING.findall(frame)) for frame in frames[: len(turns)]]
        plain = set.intersection(*openings) if openings else set()
        plain |= {
            closing[1]
            for content, frame in zip(contents, frames[1:], strict=True)
            if content in _ANSWERS and (closing := _CLOSING.match(frame))
        }
        found |= dict.fromkeys(_in_order(frames, plain))
    calls = _render(encoder, [_TURNS[0], _CALL, _TOOL, _TURNS[1]]) if with_calls else ""
    found |= dict.fromkeys(_in_order(_CONTENT.split(calls), set()))
    return list(found)


def is_known(encoder: Encoder, token: str) -> bool:
    """Whether the tokenizer has one id for a token, and gives it where the token stands in a text."""
    token_id = encoder.token_id(token)
    return token_id is not None and token_id in encoder.tokenize(token).tolist()


def unknown_tokens_warning(encoder: Encoder) -> str | None:
    """Returns a line on control tokens of plain chats that the tokenizer does not know; None where it does."""
    written = control_tokens(encoder, with_calls=False) if encoder.has_chat_template else []
    unknown = [token for token in written if not is_known(encoder, token)]
    if not unknown:
        return None
    counts = (f"{token} ({len(encoder.tokenize(token))})" for token in unknown)
    return (
        f"warning: the tokenizer of {encoder.folder} does not know control tokens that the chat template writes, and "
        f"cuts them into pieces: {', '.join(counts)}; where the model was not trained so before, pass "
        "--new_special_tokens template to add them, or take a template that fits"
    )


def _in_order(frames: Sequence[str], plain: set[str]) -> list[str]:
    """Returns the control tokens of all frames by their places: all of barred forms, and the plain ones."""
    words = [_BARRED.pattern, *map(re.escape, sorted(plain, key=len, reverse=True))]
    pattern = re.compile("|".join(words))
    return [token for frame in frames for token in pattern.findall(frame)]


def _render(
    encoder: Encoder, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    try:
        return encoder.render(messages, add_generation_prompt=add_generation_prompt)
    except SftcoreError:
        return ""
