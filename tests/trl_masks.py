"""Trained spans beside the `{% generation %}` tags of TRL's own training templates.

`python tests/trl_masks.py --templates DIR --shared DIR` takes each pair `NAME.jinja` and
`NAME_training.jinja` of a folder and compares, row by row, what following the contents finds under
the first with what the tags of the second say. Where the training template writes another text, its
own text with the tags taken out is followed instead, so that every row has two masks of one text. A
template that comes with tags is compared with itself, without them. The tags are also read here, which
must give what Transformers reads.

What differs has a kind: who trains the characters alone, which characters (`…` is what the row says), and where
in the turn they stand. The kinds of TRL 1.16 are judged in `docs/templates.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_rows import ROWS, in_short
from native_tokenizers import NativeTokenizers, eos_of
from sftcore.data import Encoder
from sftcore.errors import SftcoreError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


@dataclass(frozen=True)
class Difference:
    """A stretch that one side alone trains, or a row that one side alone has.

    Attributes:
        kind: What differs.
        row: The name of the row.
        sample: The stretch and what stands round it, first as it is trained here.
    """

    kind: str
    row: str
    sample: str


@dataclass
class Comparison:
    """One pair of templates.

    Attributes:
        name: The template without tags.
        rows: How many rows had two masks to compare.
        equal: How many of them are equal.
        near: How many are equal but for white space after the end of a turn.
        differences: All that differs.
    """

    name: str
    rows: int = 0
    equal: int = 0
    near: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, kind: str, row: str, sample: str = "") -> None:
        """Notes a difference."""
        self.differences.append(Difference(kind, row, sample))

    @property
    def kinds(self) -> dict[str, list[Difference]]:
        """The differences by kind."""
        found = defaultdict(list)
        for difference in self.differences:
            found[difference.kind].append(difference)
        return dict(found)


def pairs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The name, source and training source of each pair in `folder`."""
    for path in sorted(folder.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        training = path.with_name(f"{path.stem}_training.jinja")
        if training.is_file():
            yield path.stem, source, training.read_text(encoding="utf-8")
        elif not path.stem.endswith("_training") and TAG.search(source):
            yield path.stem, untagged(source), source


def untagged(source: str) -> str:
    """A source with its tags replaced by what trims white space as they do and says nothing of training."""
    return TAG.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", source
    )


def by_tags(oracle: Any, row: dict[str, Any], source: str) -> tuple[str, list[bool]]:
    """The text of a row as Transformers renders it, and which characters its tags cover."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # as `apply_chat_template` does
    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in row["messages"]
    ]
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=row.get("tools"),
        chat_template=source,
        return_assistant_tokens_mask=True,
        **oracle.special_tokens_map,
        **row.get("chat_template_kwargs", {}),
    )
    trained = [False] * len(texts[0])
    for start, end in spans[0]:
        trained[start:end] = [True] * (end - start)
    return texts[0], trained


def by_following(encoder: Encoder, row: dict[str, Any]) -> tuple[str, list[bool]]:
    """The text of a row as it is rendered here, and which characters are trained."""
    example = encoder.encode(row)
    encoded = example.text.encode()
    trained: list[bool] = []
    for start, end, is_trained in example.segments:
        trained += [is_trained] * len(encoded[start:end].decode())
    return example.text, trained


def marked(text: str, trained: list[bool]) -> str:
    """A text with its trained stretches between «»."""
    shown, before = "", False
    for character, now in zip(text, trained, strict=True):
        shown += ("»" if before else "«") if now != before else ""
        shown += character
        before = now
    return shown + ("»" if before else "")


def compare_masks(
    found: Comparison, name: str, text: str, here: list[bool], tags: list[bool]
) -> None:
    """Notes each stretch of the row `name` that one of two masks alone trains."""
    both = [first and second for first, second in zip(here, tags, strict=True)]
    kinds = []
    start = 0
    while start < len(text):
        end = start
        while end < len(text) and (here[end], tags[end]) == (here[start], tags[start]):
            end += 1
        if here[start] != tags[start]:
            place = {
                (False, False): "apart",
                (False, True): "before a turn",
                (True, False): "after a turn",
                (True, True): "between two turns",
            }[start > 0 and both[start - 1], end < len(text) and both[end]]
            who = "TRL" if tags[start] else "here"
            kind = f"{who} alone trains {in_short(text[start:end], ROWS[name])!r} {place}"
            window = slice(max(0, start - 16), end + 16)
            samples = (marked(text[window], mask[window]) for mask in (here, tags))
            found.add(kind, name, " TRL: ".join(samples))
            kinds.append(kind)
        start = end
    found.rows += 1
    found.equal += not kinds
    found.near += all(
        re.fullmatch(r"TRL alone trains '(\\n| )+' after a turn", kind) for kind in kinds
    )


def compare(
    name: str, source: str, training: str, encoders: dict[str, Encoder], oracle: Any
) -> Comparison:
    """Compares one pair on all rows.

    Args:
        name: Of the pair.
        source: The template without tags.
        training: The one with tags.
        encoders: With `source` (`plain`), with `training` (`tagged`), and with that without its tags (`untagged`).
        oracle: The tokenizer in Transformers.
    """
    found = Comparison(name)
    for row_name, row in ROWS.items():
        try:
            text, tags = by_tags(oracle, row, training)
        except Exception:  # what a template raises, and what Python does
            continue
        try:
            plain = by_tags(oracle, row, source)[0]
        except Exception:
            plain = None
        if plain != text:
            fails = "renders, the other fails" if plain is None else "writes another text"
            found.add(f"the training template {fails}", row_name)
        way = "plain" if plain == text else "untagged"
        try:
            shown, here = by_following(encoders[way], row)
        except SftcoreError as error:
            empty = "leaves out or changes all that" in str(error)
            found.add(
                "refused: nothing of a turn is in the text" if empty else f"refused: {error}",
                row_name,
            )
            continue
        if shown != text:
            lowered = "calls" if "tool_calls" in str(row) else "parts"
            found.add(f"{lowered} go in as text here", row_name)
            continue
        compare_masks(found, row_name, text, here, tags)
        if by_following(encoders["tagged"], row) != (text, tags):
            found.add("the tags are read otherwise", row_name)
    return found


def run(templates: Path, shared: Path) -> list[Comparison]:
    """Compares every pair of a folder."""
    import transformers

    found = []
    with tempfile.TemporaryDirectory() as work:
        native = NativeTokenizers(shared, Path(work), templates)
        for name, source, training in pairs(templates):
            encoders = {}
            ways = (("plain", source), ("untagged", untagged(training)), ("tagged", training))
            for way, text in ways:
                path = Path(work) / f"{way}.jinja"
                path.write_text(text, encoding="utf-8")
                encoders[way] = native.encoder(source, path)
            folder = native.folder(eos_of(source))
            oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            found.append(compare(name, source, training, encoders, oracle))
    return found


def in_cell(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("\n", "↵").replace("|", "\\|")


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as one table: a line for each template, and one for each kind below it."""
    lines = [
        "| template | rows | equal | but for white space after the end | what differs | times | sample |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for found in comparisons:
        lines.append(f"| {found.name} | {found.rows} | {found.equal} | {found.near} | | | |")
        for kind, those in sorted(found.kinds.items()):
            sample = those[0].sample or ", ".join(difference.row for difference in those)
            lines.append(f"| | | | | {in_cell(kind)} | {len(those)} | {in_cell(sample)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--templates", type=Path, required=True, help="a folder of TRL's templates")
    parser.add_argument("--shared", type=Path, required=True, help="the shared data")
    known = parser.parse_args()
    if not any(known.templates.glob("*_training.jinja")):
        sys.exit(
            f"{known.templates}: no file *_training.jinja there; pass the folder chat_templates of TRL's package"
        )
    print(table(run(known.templates, known.shared)))


if __name__ == "__main__":
    main()
