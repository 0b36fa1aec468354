"""A corpus of any size, mixed of real rows, with the lengths that real chats have.

Most rows are one question and its answer; a quarter of those go on with one to seven more of the same language. A few
percent are long chats, conversations with tools, and long tasks of an agent. A number in the first question makes every
row another one. Rows are joined from pieces that were serialised once, so writing is as fast as the disk; the
same seed gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(
    os.environ.get("SFTCORE_SHARED", Path(__file__).parent.parent.parent / "shared" / "data")
)
# what a row is mixed from: its share of the rows, and whether more of its kind may follow it
PARTS = [
    (0.46, True, ["llamafactory/alpaca_en_demo.json", "gpteacher/roleplay.json"]),
    (0.08, True, ["gsm8k/train.jsonl", "alpaca_eval/gpt-4o-2024-05-13_outputs.json"]),
    (0.10, True, ["codealpaca/code_alpaca_2k.json"]),
    (0.20, True, ["alpaca-chinese/zh-data-part-00.json", "llamafactory/alpaca_zh_demo.json"]),
    (0.04, True, ["huatuo/llama_data.json", "self-llm/huanhuan.jsonl"]),
    (0.08, False, ["emollm/aiwei.jsonl"]),
    (
        0.03,
        False,
        ["llamafactory/glaive_toolcall_en_demo.json", "llamafactory/glaive_toolcall_zh_demo.json"],
    ),
    (0.01, False, ["tau-bench/gpt-4o-airline_000-099.json"]),
]
# how many pairs follow the first, where they may
NUM_MORE, MORE_SHARES = range(8), [0.75, *[0.25 / 7] * 7]
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ROWS_PER_WRITE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A file of rows.

    Attributes:
        path: The file.
        rows: Its rows.
        size: Its bytes.
    """

    path: Path
    rows: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A serialised conversation.

    Attributes:
        start: Up to the end of the first question.
        end: The rest of its messages.
        more: All its messages, as they follow others.
    """

    start: bytes
    end: bytes
    more: bytes


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON or jsonl file."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line]


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a row; empty where an answer is."""
    if "traj" in row or "conversations" in row:
        turns = []
        for message in row.get("traj") or row["conversations"]:
            role = message.get("role") or ROLES[message["from"]]
            calls = [json.dumps(call["function"]) for call in message.get("tool_calls") or []]
            text = message.get("content") or message.get("value") or ""
            turns.append((role, "\n".join([*([text] if text else []), *calls])))
    else:
        question = row.get("instruction") or row.get("question") or row["query"]
        if row.get("input"):
            question += "\n" + row["input"]
        answer = next(row[key] for key in ("output", "response", "answer") if key in row)
        pairs = [*row.get("history", []), (question, answer)]
        turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return messages if messages[-1]["content"] else []


def piece_of(row: dict[str, Any]) -> Piece | None:
    """A row, serialised; None where it has no answer."""
    messages = messages_of(row)
    if not messages:
        return None
    texts = [json.dumps(message, ensure_ascii=False) for message in messages]
    first = next(place for place, message in enumerate(messages) if message["role"] == "user")
    tools = f'"tools": {json.dumps(row["tools"], ensure_ascii=False)}, ' if row.get("tools") else ""
    before = "".join(text + ", " for text in texts[:first])
    # the number of the row goes before the quotation mark that ends the question
    start, end = texts[first][:-2], "".join(['"}', *(f", {text}" for text in texts[first + 1 :])])
    return Piece(
        start=f'{{{tools}"messages": [{before}{start}'.encode(),
        end=end.encode(),
        more="".join(f", {text}" for text in texts).encode(),
    )


def _parts() -> list[tuple[bool, list[Piece]]]:
    parts = []
    for _, may_go_on, names in PARTS:
        rows = (row for name in names for row in read_rows(SHARED / "datasets" / name))
        parts.append((may_go_on, [piece for row in rows if (piece := piece_of(row))]))
    return parts


def _rows(seed: int) -> Iterator[list[bytes]]:
    """All rows that there could be, some thousands at a time."""
    parts = _parts()
    shares = [share for share, _, _ in PARTS]
    rnd = random.Random(seed)
    number = 0
    while True:
        rows = []
        for (may_go_on, pieces), num_more in zip(
            rnd.choices(parts, shares, k=ROWS_PER_WRITE),
            rnd.choices(NUM_MORE, MORE_SHARES, k=ROWS_PER_WRITE),
            strict=True,
        ):
            number += 1
            first = pieces[int(rnd.random() * len(pieces))]
            row = b"%b (%d)%b" % (first.start, number, first.end)
            if may_go_on and num_more:
                row += b"".join([piece.more for piece in rnd.choices(pieces, k=num_more)])
            rows.append(row + b"]}\n")
        yield rows


def write_corpus(path: Path, size: int, seed: int = 0) -> Corpus:
    """Writes whole rows up to at least `size` bytes; a file that this wrote before is taken as it is."""
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    wanted = {"wanted": size, "seed": seed, "made_by": made_by}
    about = path.with_suffix(".about.json")
    if path.is_file() and about.is_file():
        found = json.loads(about.read_text(encoding="utf-8"))
        if found == {**found, **wanted, "size": path.stat().st_size}:
            return Corpus(path=path, rows=found["rows"], size=found["size"])
    about.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size * 1.1:
        raise SystemExit(
            f"{path}: {free / 1e9:.1f} GB are free, expected {size * 1.1 / 1e9:.1f}; pass another --folder"
        )
    num_rows = written = 0
    with path.open("wb") as file:
        for rows in _rows(seed):
            for place, row in enumerate(rows):
                written += len(row)
                if written >= size:
                    rows = rows[: place + 1]
                    break
            num_rows += len(rows)
            file.write(b"".join(rows))
            if written >= size:
                break
    about.write_text(json.dumps({**wanted, "rows": num_rows, "size": written}), encoding="utf-8")
    return Corpus(path=path, rows=num_rows, size=written)
