"""What is trained under each shared chat template, as a page.

`python tests/template_table.py --shared DIR --out docs/template-table.md` encodes rows of chats and agents with every
template, each on a tokenizer that knows its control tokens, and writes one line a template: where turns
end, which rows are taken, what the template leaves out, and which way it renders. Transformers renders the same rows; a
row that it renders and that is refused here is named with the error, and so is a mask that is wrong on the face of it.
The shared data needs the folder `cases` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_rows import ROWS, in_short
from native_tokenizers import NativeTokenizers, eos_of
from sftcore.data import Encoder
from sftcore.data.encoder import TurnEnd
from sftcore.errors import SftcoreError, TemplateError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# column → row
COLUMNS = {
    "chat": "two questions",
    "call": "call",
    "call last": "call at the end",
    "text": "call, arguments as text",
    "words": "words beside a call",
    "parallel": "calls side by side",
    "in turn": "calls in turn",
    "system": "system in the middle",
    "first": "assistant first",
    "twice": "two answers in a row",
    "thoughts": "reasoning",
    "parts": "parts",
}
# rows that went wrong once: their texts are too short to tell apart, so that only their refusal counts
CASES = ("refused-agent", "dropped-answer", "moved-content", "stop-token")
FAMILIES = {
    "Qwen": "qwen|qwq",
    "Llama": "(?<!o)llama(?!-cpp)",
    "Mistral": "mi[sx]tral|devstral|pixtral",
    "Gemma": "gemma",
    "DeepSeek": "deepseek",
    "GLM": "glm",
    "gpt-oss": "gpt-?oss",
    "Command": "command|cohere|aya",
    "Granite": "granite",
    "Phi": "phi",
    "SmolLM": "smollm",
    "Nemotron": "nemotron",
    "Kimi": "kimi",
}
EMPTY = "leaves out or changes all that"
# letters that a template may put into a turn beside what the row says: the keys of a call
OWN_LETTERS = 120


@dataclass
class Line:
    """One template of the page.

    Attributes:
        name: The file, without its suffix.
        problem: Why the template cannot be used at all.
        ends: What closes an answer inside a chat, a call, and the last answer.
        cells: Column → `yes`, `less`, `-`, `empty` or `refused`.
        reasons: Error → the columns it stands for.
        refused: Rows that Transformers renders and that are refused here though their words are in the text.
        wrong: What is wrong with a mask → the rows.
        lost: What the template leaves out, by kind.
        way: Which way plain chats render, and how spans are found.
    """

    name: str
    problem: str = ""
    ends: tuple[str, str, str] = ("", "", "")
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    lost: list[str] = field(default_factory=list)
    way: str = ""

    @property
    def families(self) -> list[str]:
        """The families it belongs to by its name."""
        return [family for family, name in FAMILIES.items() if re.search(name, self.name, re.I)]


def read_cases(cases: Path) -> dict[str, dict[str, Any]]:
    """The rows that went wrong once, by case and number."""
    found = {}
    for case in CASES:
        lines = (cases / case / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        found |= {f"{case} {number}": json.loads(line) for number, line in enumerate(lines, 1)}
    return found


def rendered(oracle: Any, row: dict[str, Any], source: str) -> str | None:
    """A row as Transformers renders it; None where it does not."""
    try:
        return oracle.apply_chat_template(
            row["messages"], tools=row.get("tools"), chat_template=source, tokenize=False
        )
    except Exception:  # what a template raises, and what Python does
        return None


def kind_of(lost: str) -> str:
    """What was left out, without its place."""
    kind = re.sub(r"the (\w+) of messages\[\d+\] \((\w+)\)", r"\1 of \2", lost)
    kind = re.sub(r"messages\[\d+\]\.tool_calls\[\d+\]", "calls", kind)
    kind = re.sub(r"tools\[\d+\]", "tools", kind)
    return kind.replace("content of tool", "results").replace("content of", "words of")


def faults(
    encoder: Encoder, row: dict[str, Any], text: str, trained: Sequence[str], eos: str
) -> Iterator[str]:
    """What is wrong with the mask of a row, as far as that can be told without knowing the template.

    Args:
        encoder: With the template.
        row: The row.
        text: As it renders.
        trained: The trained stretches of the text.
        eos: The token at which the model stops.
    """
    for message in row["messages"]:
        content = message["content"] or ""
        words = content if isinstance(content, str) else content[0]["text"]
        said = [words.strip(), *re.findall(r"Town\d", str(message.get("tool_calls", "")))]
        for word in filter(None, said):
            inside = any(word in stretch for stretch in trained)
            if message["role"] != "assistant" and inside:
                yield f"words of {message['role']} are trained"
            if message["role"] == "assistant" and word in text and not inside:
                yield "words of the assistant are not trained"
    header = header_of(encoder, row)
    for stretch in trained:
        said = in_short(stretch, row)
        # a model may write a header itself, as gpt-oss does after a thought; after its eos it may not
        if header and (header in said.split("…")[0] or eos + header in said):
            yield "the header of a turn is trained"
        own = re.sub(r"<[^<>]*>", "", said)
        if len(re.findall(r"\w", own)) > OWN_LETTERS:
            yield "words of the template are trained"


def header_of(encoder: Encoder, row: dict[str, Any]) -> str:
    """The last line of what a prompt adds to a question, without a forced thought; empty where it adds nothing."""
    question = {**row, "messages": [{"role": "user", "content": "Question?"}]}
    try:
        asked, prompted = (
            encoder.render(question, add_generation_prompt=add) for add in (False, True)
        )
    except SftcoreError:
        return ""
    return prompted.removeprefix(asked).split("<think>")[0].strip().split("\n")[-1]


def shown_end(end: TurnEnd | None, source: str) -> str:
    """What closes a turn, as the page has it."""
    if end is None:
        return "nothing"
    eos = eos_of(source)
    return code(end.text if eos in source else end.text.replace(eos, "eos"))


def code(text: str) -> str:
    """A text as code in a table."""
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


def line_of(encoder: Encoder, name: str, source: str, cases: dict[str, Any], oracle: Any) -> Line:
    """Encodes all rows with one template."""
    ends = encoder.turn_ends
    shows_calls = "tool_calls" in source
    call_end = shown_end(ends.call, source) if shows_calls else "calls are text"
    line = Line(name, ends=(shown_end(ends.inner, source), call_end, shown_end(ends.last, source)))
    lost: dict[str, None] = {}
    rows = {column: ROWS[row] for column, row in COLUMNS.items()}
    for column, row in (rows | cases).items():
        oracle_text = rendered(oracle, row, source)
        try:
            example = encoder.encode(row)
        except SftcoreError as error:
            reason = str(error)
            cell = "-" if oracle_text is None else "empty" if EMPTY in reason else "refused"
            if cell == "refused":
                line.refused[column] = reason
            if column in rows:
                line.cells[column] = cell
                line.reasons[re.sub(r"messages\[\d+\]", "messages[N]", reason)].append(column)
            continue
        if column not in rows:
            continue
        line.cells[column] = "less" if example.lost else "yes"
        lost |= dict.fromkeys(map(kind_of, example.lost))
        encoded = example.text.encode()
        trained = [encoded[start:end].decode() for start, end, given in example.segments if given]
        found = faults(encoder, row, example.text, trained, eos_of(source))
        for fault in dict.fromkeys(found):
            line.wrong[fault].append(column)
        has_calls = any("tool_calls" in message for message in row["messages"])
        is_as_given = column != "parts" and (shows_calls or not has_calls)
        if is_as_given and oracle_text not in (None, example.text):
            line.wrong["the text is another than that of Transformers"].append(column)
    line.lost = list(lost)
    template = encoder._core.template()
    line.way = "compiled" if template.compiled_form()[0] else "Jinja"
    line.way += ", tags" if template.is_tagged else ""
    return line


def make_lines(shared: Path, names: Sequence[str] | None = None) -> list[Line]:
    """The lines of the templates `names`, or of all shared ones."""
    import transformers

    cases = read_cases(shared.parent / "cases")
    found = []
    with tempfile.TemporaryDirectory() as work:
        native = NativeTokenizers(shared, Path(work), shared / "templates")
        oracles: dict[str, Any] = {}
        for path in sorted((shared / "templates").glob("*.jinja")):
            if names is not None and path.stem not in names:
                continue
            source = path.read_text(encoding="utf-8")
            try:
                encoder = native.encoder(source, path)
            except TemplateError as error:
                found.append(Line(path.stem, problem=str(error)))
                continue
            eos = eos_of(source)
            if eos not in oracles:
                folder = native.folder(eos)
                oracles[eos] = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            found.append(line_of(encoder, path.stem, source, cases, oracles[eos]))
    return found


def table_line(line: Line) -> str:
    """The line of a template in the table."""
    cells = [line.cells.get(column, "-") for column in COLUMNS]
    shown = [line.name, *line.ends, *cells, ", ".join(line.lost), line.way]
    return "| " + " | ".join(shown) + " |"


def page(lines: Sequence[Line]) -> str:
    """The whole page."""
    columns = "\n".join(f"| {column} | {row} |" for column, row in COLUMNS.items())
    heads = [
        "template",
        "inside a chat",
        "after a call",
        "at the end",
        *COLUMNS,
        "leaves out",
        "way",
    ]
    usable = [line for line in lines if not line.problem]
    table = "\n".join(
        ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(table_line, usable)]
    )
    return f"""# What is trained under each chat template

Written by `python tests/template_table.py --shared DIR --out docs/template-table.md`; do not edit it.
[templates.md](templates.md) has the rules. Each template of the shared data, on a tokenizer that knows its
control tokens and has the eos of its model (`eos` where the template does not write that out), beside
Transformers on the same rows.

The columns after the name are what closes an answer inside a chat, a call before the answer of the tool, and
an answer at the end; "nothing": the template writes nothing there, or does not render a plain chat with
it; "calls are text": the template has no place for calls; they go in as text, and end as answers do. The
next columns are rows (`tests/agent_rows.py`):

| column | row |
|---|---|
{columns}

| cell | what it says |
|---|---|
| `yes` | taken: all that the row says is in the text, and what the assistant says of it is trained |
| `less` | taken: the template leaves out of the row what the column "leaves out" names |
| `-` | Transformers does not render the row with this template either |
| `empty` | refused: the template shows nothing of a turn, so that its end alone would be trained |
| `refused` | refused here, though Transformers renders it and the words are in the text |

`way` is how plain chats render, by the compiled form or by Jinja; `tags` decide what is trained where a
template has them.

{table}

## Why a row is not taken

{reasons(lines)}

## Counts

{counts(lines)}
"""


def reasons(lines: Sequence[Line]) -> str:
    """The errors of all templates, each with its rows."""
    found = []
    for line in lines:
        if line.problem:
            found.append(f"- {line.name}, all: {line.problem}")
        for reason, columns in line.reasons.items():
            found.append(f"- {line.name}, {', '.join(columns)}: {' '.join(reason.split())}")
    return "\n".join(found)


def counts(lines: Sequence[Line]) -> str:
    """What the table has of each kind, and what should not be there."""
    usable = [line for line in lines if not line.problem]
    cells = Counter(cell for line in usable for cell in line.cells.values())
    ways = Counter(line.way for line in usable)
    endless = [line.name for line in usable if line.ends[0] == line.ends[2] == "nothing"]
    late = [line.name for line in usable if line.ends[2] == "nothing" != line.ends[0]]
    found = [
        f"{len(lines)} templates, {len(usable)} usable; "
        + ", ".join(f"{way}: {number}" for way, number in sorted(ways.items()))
        + ".",
        "Rows: " + ", ".join(f"`{cell}` {number}" for cell, number in sorted(cells.items())) + ".",
        f"Nothing closes any answer ({len(endless)}): {', '.join(endless)}.",
        f"Nothing closes the last answer ({len(late)}): {', '.join(late)}.",
    ]
    found.append(
        "Rows of chats and agents that are refused here though Transformers renders them, by family:"
    )
    families = [f"| {family} | {members(usable, family)} |" for family in FAMILIES]
    head = "| family | templates | refused | empty |\n|---|---|---|---|"
    found.append("\n".join([head, *families]))
    bad = [
        f"- {line.name}, {row}: {reason}" for line in usable for row, reason in line.refused.items()
    ]
    bad += [
        f"- {line.name}, {', '.join(columns)}: {fault}"
        for line in usable
        for fault, columns in line.wrong.items()
    ]
    found.append(
        "What is wrong:\n\n" + "\n".join(bad)
        if bad
        else "What is wrong: nothing that was looked for."
    )
    return "\n\n".join(found)


def members(lines: Sequence[Line], family: str) -> str:
    """How many templates a family has, and how many of their rows are refused."""
    those = [line for line in lines if family in line.families]
    empty = sum(cell == "empty" for line in those for cell in line.cells.values())
    return f"{len(those)} | {sum(len(line.refused) for line in those)} | {empty}"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="the shared data")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    known = parser.parse_args()
    known.out.write_text(page(make_lines(known.shared)), encoding="utf-8")


if __name__ == "__main__":
    main()
