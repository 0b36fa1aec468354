"""Rows of the kinds that chats and agents come in, each text in them told apart from every other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def user(content: Any) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": content}


def answer(content: Any, *calls: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """What the assistant says."""
    given = {"tool_calls": list(calls)} if calls else {}
    return {"role": "assistant", "content": content, **given, **rest}


def call(number: int, arguments: Any = None) -> dict[str, Any]:
    """The call `number` of the one tool."""
    arguments = {"city": f"Town{number}"} if arguments is None else arguments
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(number: int) -> dict[str, Any]:
    """What the tool answers to the call `number`."""
    return {
        "role": "tool",
        "tool_call_id": f"call0000{number}",
        "name": "get_weather",
        "content": f"{number} degrees",
    }


def parts(text: str) -> list[dict[str, str]]:
    """A content as a list of one part."""
    return [{"type": "text", "text": text}]


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}
CHAT = [user("Question one?"), answer("Answer one."), user("Question two?"), answer("Answer two.")]
THOUGHT = [
    user("Question one?"),
    answer("Answer one.", reasoning_content="Reason one."),
    user("Question two?"),
    answer("Answer two.", reasoning_content="Reason two."),
]
TAGGED = [
    user("Question one?"),
    answer("<think>\nReason one.\n</think>\n\nAnswer one."),
    user("Question two?"),
    answer("<think>\nReason two.\n</think>\n\nAnswer two."),
]
PARTS = [
    user(parts("Question one?")),
    answer(parts("Answer one.")),
    user(parts("Question two?")),
    answer(parts("Answer two.")),
]


def chat(*messages: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """A row without tools."""
    return {"messages": list(messages), **({"chat_template_kwargs": kwargs} if kwargs else {})}


def agent(*messages: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """A row with the tool."""
    return {**chat(*messages, **kwargs), "tools": [TOOL]}


ROWS: dict[str, dict[str, Any]] = {
    "question and answer": chat(*CHAT[:2]),
    "two questions": chat(*CHAT),
    "system": chat(SYSTEM, *CHAT),
    "system in the middle": chat(*CHAT[:2], SYSTEM, *CHAT[2:]),
    "assistant first": chat(answer("Hello."), *CHAT[:2]),
    "two answers in a row": chat(*CHAT[:2], answer("More.")),
    "line breaks round answers": chat(
        CHAT[0], answer("\nAnswer one.\n"), CHAT[2], answer(" Two. ")
    ),
    "parts": chat(*PARTS),
    "parts, system": chat({"role": "system", "content": parts("Be brief.")}, *PARTS),
    "reasoning": chat(*THOUGHT),
    "reasoning in tags": chat(*TAGGED),
    "thinking off": chat(*CHAT, enable_thinking=False),
    "thinking on": chat(*CHAT, enable_thinking=True),
    "thinking on, reasoning": chat(*THOUGHT, enable_thinking=True),
    "call at the end": agent(CHAT[0], answer("", call(1))),
    "call": agent(CHAT[0], answer("", call(1)), result(1), answer("Answer one.")),
    "call, arguments as text": agent(
        CHAT[0], answer("", call(1, '{"city": "Town1"}')), result(1), answer("Answer one.")
    ),
    "call without content": agent(CHAT[0], answer(None, call(1)), result(1), answer("Answer one.")),
    "call without content, arguments as text": agent(
        CHAT[0], answer(None, call(1, '{"city": "Town1"}')), result(1), answer("Answer one.")
    ),
    "words beside a call": agent(
        SYSTEM,
        CHAT[0],
        answer("Let me look.", call(1)),
        result(1),
        answer("Answer one."),
        *CHAT[2:],
    ),
    "calls side by side": agent(
        CHAT[0], answer("", call(1), call(2)), result(1), result(2), answer("Answer one.")
    ),
    "calls in turn": agent(
        CHAT[0],
        answer("", call(1)),
        result(1),
        answer("", call(2)),
        result(2),
        answer("Answer one."),
        CHAT[2],
        answer("", call(3)),
        result(3),
        answer("Answer two."),
    ),
    "call with reasoning": agent(
        CHAT[0],
        answer("", call(1), reasoning_content="Reason one."),
        result(1),
        answer("Answer one.", reasoning_content="Reason two."),
    ),
    "result at the end": agent(*CHAT, CHAT[0], answer("", call(1)), result(1)),
    "tools, none called": agent(*CHAT),
}


def sayings(value: Any) -> Iterator[str]:
    """All texts that the messages of a row put into a rendered text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("role", "type", "id", "tool_call_id"):
                yield from sayings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from sayings(inner)
    elif isinstance(value, str):
        yield value.strip()


def in_short(text: str, row: dict[str, Any]) -> str:
    """A text with what the row says left out."""
    for saying in sorted(set(sayings(row["messages"])) - {""}, key=len, reverse=True):
        text = text.replace(saying, "…")
    return text
