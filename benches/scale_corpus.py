"""A corpus of any size, mixed of real rows, with the lengths that real chats have.

Most rows are one question and its answer, a quarter are two to eight of them, one in twelve is a long chat, one in
thirty calls tools. A number in each first question makes every row another one.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from test_parity import read_rows, to_messages

SHARED = Path(
    os.environ.get("SFTCORE_SHARED", Path(__file__).parent.parent.parent / "shared" / "data")
)
PAIRS = {
    "en": ["gpteacher/roleplay.json", "llamafactory/alpaca_en_demo.json", "gsm8k/train.jsonl"],
    "zh": ["alpaca-chinese/zh-data-part-00.json", "llamafactory/alpaca_zh_demo.json"],
    "code": ["codealpaca/code_alpaca_2k.json"],
}
CHATS = ["emollm/aiwei.jsonl", "self-llm/huanhuan.jsonl"]
TOOLS = ["llamafactory/glaive_toolcall_en_demo.json", "llamafactory/glaive_toolcall_zh_demo.json"]
_CHUNK = 4 << 20


def _load() -> tuple[list[list[tuple[str, str]]], list[str], list[str]]:
    """Serialised pieces: question and answer pairs by kind, whole chats, whole chats with tools."""
    pairs = []
    for names in PAIRS.values():
        found = []
        for row in (row for name in names for row in read_rows(SHARED / "datasets" / name)):
            messages, _ = to_messages(row)
            texts = [message["content"] for message in messages if message["role"] != "system"]
            if len(texts) == 2 and all(texts):
                found.append((_dump(texts[0])[1:-1], _dump(texts[1])))
        pairs.append(found)
    chats, tools = [], []
    for name in CHATS:
        chats += [_dump(to_messages(row)[0]) for row in read_rows(SHARED / "datasets" / name)]
    for name in TOOLS:
        rows = read_rows(SHARED / "datasets" / name)
        tools += [_dump({"tools": row["tools"], "messages": to_messages(row)[0]}) for row in rows]
    return pairs, chats, tools


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _turns(pairs: list[tuple[str, str]], number: int, rows: int, rnd: random.Random) -> str:
    turns = []
    for question, answer in rnd.choices(pairs, k=rows):
        turns.append(
            f'{{"role": "user", "content": "{question} ({number})"}}, '
            f'{{"role": "assistant", "content": {answer}}}'
        )
    return f'{{"messages": [{", ".join(turns)}]}}'


def write_corpus(path: Path, size: int, seed: int = 0) -> int:
    """Writes at least `size` bytes and returns the rows; a file that is there is taken as it is."""
    count = path.with_suffix(".rows")
    if path.is_file() and count.is_file() and path.stat().st_size >= size:
        return int(count.read_text())
    pairs, chats, tools = _load()
    rnd = random.Random(seed)
    rows, written, lines, held = 0, 0, [], 0
    with path.open("wb") as file:
        while written + held < size:
            rows += 1
            kind = rnd.random()
            if kind < 1 / 30:
                line = rnd.choice(tools).replace('"content": "', f'"content": "({rows}) ', 1)
            elif kind < 1 / 30 + 1 / 12:
                line = rnd.choice(chats).replace('"content": "', f'"content": "({rows}) ', 1)
                line = f'{{"messages": {line}}}'
            else:
                several = 1 if rnd.random() < 0.75 else rnd.randint(2, 8)
                kind_of_pairs = rnd.choices(pairs, weights=[5, 3, 2])[0]
                line = _turns(kind_of_pairs, rows, several, rnd)
            encoded = line.encode() + b"\n"
            lines.append(encoded)
            held += len(encoded)
            if held > _CHUNK:
                file.writelines(lines)
                written, lines, held = written + held, [], 0
        file.writelines(lines)
    count.write_text(str(rows))
    return rows
