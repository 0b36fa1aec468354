"""Every tokenizer with every template on rows of every data set, beside Transformers.

`python tests/parity.py` runs all pairs and prints what was compared; `test_pairs.py` runs a part of
them. For each row that Transformers can render, text and ids are compared; for the templates of
`tagged_templates.py` also the mask, with that of the hand-tagged template.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent_parity import Check, run_agents, table
from sftcore.data import Encoder
from sftcore.errors import RowError, SftcoreError, TemplateError
from tagged_templates import TAGS, tagged
from test_parity import FILES, read_rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
# templates that close a turn with nothing of its own
NEXT_ROLE_STOPS = {"GLM-4.6.jinja"}
# tokenizers that drop white space: Transformers finds no token at the border of a span, and its mask is empty
LOSSY = ("minilm-bert", "t5-small")


@dataclass
class Report:
    """What was compared, and where the two sides differ."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """The counts, the refusals and the first differences, line by line."""
        counts = self.counts
        lines = [
            f"{counts['pairs']:,} pairs of a tokenizer and a template, {counts['rows']:,} rows, "
            f"{counts['tokens']:,} tokens: {len(self.differences)} differences; "
            f"{counts['masks']:,} masks compared with hand-tagged templates; "
            f"{counts['not rendered']:,} rows that Transformers does not render"
        ]
        lines += [
            f"refused, {number:,} rows: {reason}" for reason, number in sorted(self.refused.items())
        ]
        return "\n".join(lines + self.differences[:20])


@dataclass(frozen=True)
class Conversation:
    """A row, and what the oracle makes of it."""

    name: str
    row: Any
    messages: list[dict[str, Any]]
    tools: list[Any] | None


def to_conversation(name: str, row: Any) -> Conversation | None:
    """The oracle's own reading of a row; None for a document."""
    record = {"messages": row} if isinstance(row, list) else row
    if "text" in record:
        return None
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for message in record.get("messages") or record.get("conversations") or []:
        role = message.get("role") or message["from"]
        content = message.get("content", message.get("value"))
        if role == "function_call":
            calls = json.loads(content)
            calls = calls if isinstance(calls, list) else [calls]
            calls = [{"type": "function", "function": call} for call in calls]
            verbatim = {"_text": content}
            messages.append({"role": "assistant", "content": None, "tool_calls": calls, **verbatim})
            continue
        if isinstance(content, list):
            content = [
                {"type": "text", "text": part["value"]} if "value" in part else part
                for part in content
            ]
        rest = {
            key: value
            for key, value in message.items()
            if key not in ("role", "from", "content", "value", "loss", "loss_weight")
        }
        messages.append({"role": ROLES.get(role, role), "content": content, **rest})
    for turn in record.get("conversation") or []:
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        question, answer = ("human", "assistant") if "human" in turn else ("input", "output")
        messages.append({"role": "user", "content": turn[question]})
        messages.append({"role": "assistant", "content": turn[answer]})
    if not any(record.get(key) for key in ("messages", "conversations", "conversation")):
        for turn in record.get("history") or []:
            question, answer = turn.values() if isinstance(turn, dict) else turn
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        question = next(
            record[key] for key in ("query", "question", "instruction") if key in record
        )
        question += "\n" + record["input"] if record.get("input") else ""
        answer = next(record[key] for key in ("response", "answer", "output") if key in record)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    tools = record.get("tools") or None
    tools = json.loads(tools) if isinstance(tools, str) else tools
    # an empty list of tools is none
    return Conversation(name, row, messages, tools or None)


def shows_parts(oracle: Any, source: str) -> bool:
    """Whether a template shows content given as parts as their text."""
    content = [{"type": "text", "text": "part one"}, {"type": "text", "text": "part two"}]
    try:
        text = oracle.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=source, tokenize=False
        )
    except Exception:
        return False
    return (
        "part one" in text and "part two" in text and "'text'" not in text and '"text"' not in text
    )


def for_template(
    messages: list[dict[str, Any]], source: str, *, takes_parts: bool
) -> list[dict[str, Any]]:
    """Messages as a template can show them: calls or parts as text where it has no place for them."""
    shown = []
    for message in messages:
        # Transformers leaves out what is None
        rest = {
            key: value for key, value in message.items() if key != "_text" and value is not None
        }
        if message.get("tool_calls") and "tool_calls" not in source:
            calls = [
                json.dumps(call["function"], ensure_ascii=False, separators=(",", ":"))
                for call in message["tool_calls"]
            ]
            said = [message["content"]] if message.get("content") else []
            text = message.get("_text") or "\n".join(said + calls)
            rest = {"role": message["role"], "content": text}
        if isinstance(rest.get("content"), list) and not takes_parts:
            rest["content"] = "".join(part.get("text", "") for part in rest["content"])
        shown.append(rest)
    return shown


def conversations(shared: Path, per_file: int) -> list[Conversation]:
    """Rows spread over each data file, and the conversations beside the templates."""
    found = []
    for name in FILES:
        rows = read_rows(shared / "datasets" / name)
        step = max(1, len(rows) // per_file)
        for number in range(0, len(rows), step)[:per_file]:
            conversation = to_conversation(f"{name}[{number}]", rows[number])
            if conversation is not None:
                found.append(conversation)
    contexts = json.loads((shared / "templates" / "contexts.json").read_text(encoding="utf-8"))
    for name, context in contexts.items():
        # content as parts has a test of its own
        if name != "parts" and not context.get("add_generation_prompt"):
            row = {"messages": context["messages"], "tools": context.get("tools")}
            found.append(Conversation(name, row, context["messages"], context.get("tools")))
    return found


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer as Transformers has it, with offsets that keep white space."""
    import transformers

    with tempfile.TemporaryDirectory() as work:
        for file in folder.iterdir():
            text = file.read_text(encoding="utf-8")
            if file.name == "tokenizer.json":
                text = text.replace('"trim_offsets": true', '"trim_offsets": false')
                text = text.replace('"trim_offsets":true', '"trim_offsets":false')
                settings = json.loads(text)
                settings["truncation"] = settings["padding"] = None
                text = json.dumps(settings, ensure_ascii=False)
            (Path(work) / file.name).write_text(text, encoding="utf-8")
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(work)
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def tagged_mask(
    oracle: Any, source: str, text: str, messages: list[dict[str, Any]], tools: list[Any] | None
) -> np.ndarray:
    """The tokens that share a character with a generation block of `source`.

    `return_assistant_tokens_mask` says the same, but misses the last tokens of a span that ends inside a
    character of several tokens.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **oracle.special_tokens_map,
    )
    trained = np.zeros(len(text) + 1, dtype=bool)
    for start, end in spans[0]:
        trained[start:end] = True
    encoded = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
    return np.array([trained[start:end].any() for start, end in encoded["offset_mapping"]])


def compare(
    encoder: Encoder, oracle: Any, template: Path, rows: list[Conversation], report: Report
) -> None:
    """Compares one pair on `rows`."""
    source = template.read_text(encoding="utf-8")
    pair = f"{encoder.folder.name} x {template.name}"
    try:
        encoder = encoder.with_template(str(template))
    except TemplateError as error:
        report.refused[f"{template.name}: {error}"] += len(rows)
        return
    report.counts["pairs"] += 1
    takes_parts = shows_parts(oracle, source)
    for conversation in rows:
        messages = for_template(conversation.messages, source, takes_parts=takes_parts)
        try:
            text = oracle.apply_chat_template(
                messages, tools=conversation.tools, chat_template=source, tokenize=False
            )
        except Exception:
            report.counts["not rendered"] += 1
            continue
        try:
            example = encoder.encode(conversation.row)
        except RowError as error:
            report.refused[f"{conversation.name}: {error}"[:160]] += 1
            continue
        except SftcoreError as error:
            report.refused[f"{template.name}: {error}"[:220]] += 1
            continue
        ids = oracle(text, add_special_tokens=False)["input_ids"]
        report.counts["rows"] += 1
        report.counts["tokens"] += len(ids)
        if example.text != text:
            report.differences.append(f"{pair}, {conversation.name}: other text")
        elif example.input_ids.tolist() != ids:
            report.differences.append(f"{pair}, {conversation.name}: other ids")
        elif template.name in TAGS and encoder.folder.name not in LOSSY:
            mask = tagged_mask(
                oracle, tagged(template.parent, template.name), text, messages, conversation.tools
            )
            report.counts["masks"] += 1
            if template.name in NEXT_ROLE_STOPS:
                # a tag cannot say that: the stop is the next header, where the tokenizer has a token for it
                follows = np.concatenate([[False], mask[:-1]])
                mask |= follows & np.isin(example.input_ids, encoder.stop_token_ids)
            if not np.array_equal(example.loss_mask, mask):
                report.differences.append(f"{pair}, {conversation.name}: other mask")


def run(
    shared: Path, *, per_file: int, every: int = 1, progress: bool = False, engine: Any = "auto"
) -> Report:
    """Compares every pair; each with every `every`-th row, a different one for each template."""
    report = Report()
    rows = conversations(shared, per_file)
    templates = sorted((shared / "templates").glob("*.jinja"))
    for folder in sorted((shared / "tokenizers").iterdir()):
        if not (folder / "tokenizer.json").is_file():
            continue
        started = time.perf_counter()
        oracle = open_tokenizer(folder)
        encoder = Encoder.from_pretrained(folder, template="chatml", tokenizer_engine=engine)
        for number, template in enumerate(templates):
            compare(encoder, oracle, template, rows[number % every :: every], report)
        if progress:
            print(
                f"{folder.name}: {encoder.tokenizer_engine} engine, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
            )
    return report


def main() -> None:
    """Runs all pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--per_file", type=int, default=3)
    parser.add_argument("--every", type=int, default=1)
    known = parser.parse_args()
    report = run(known.shared, per_file=known.per_file, every=known.every, progress=True)
    pairs = Check("every tokenizer with every template: text and ids beside Transformers", "rows")
    pairs.compared = report.counts["rows"]
    masks = Check("the same: masks beside hand-tagged templates", "rows")
    masks.compared = report.counts["masks"]
    for difference in report.differences:
        (masks if difference.endswith("other mask") else pairs).differences.append(difference)
    checks = [pairs, masks, *run_agents(known.shared)]
    print(report)
    print(table(checks))
    sys.exit(1 if any(check.differences for check in checks) else 0)


if __name__ == "__main__":
    main()
