"""Rows of agents under every shared template on native tokenizers: text, masks, stops, lost content, order of rows.

A part of `make parity`. Each check is one line of its table: what was compared, how often, and where it differs.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agent_rows import ROWS
from native_tokenizers import NativeTokenizers
from sftcore.data import Encoder
from sftcore.errors import SftcoreError, TemplateError
from template_table import make_lines

TEXT = "the text is another than that of Transformers"
THREADS = 8


@dataclass
class Check:
    """One thing that was compared.

    Attributes:
        name: What it is.
        compared: How often.
        unit: What was counted.
        differences: Where the two sides differ.
    """

    name: str
    unit: str
    compared: int = 0
    differences: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Its line of the table."""
        return f"| {self.name} | {self.compared:,} {self.unit} | {len(self.differences)} |"


def table(checks: list[Check]) -> str:
    """All checks as a table, and the first differences of each."""
    lines = ["| compared | how often | differences |", "|---|---|---|"]
    lines += [check.line() for check in checks]
    lines += [f"{check.name}: {where}" for check in checks for where in check.differences[:20]]
    return "\n".join(lines)


def page_checks(shared: Path, names: list[str] | None = None) -> list[Check]:
    """Text beside Transformers, masks beside what the rows say, and refusals."""
    text = Check("agent rows: text beside Transformers", "rows")
    mask = Check("agent rows: what the assistant says and calls, and no more, is trained", "rows")
    taken = Check("agent rows that Transformers renders are taken", "rows")
    for line in make_lines(shared, names):
        if line.problem:
            continue
        encoded = sum(cell in ("yes", "less") for cell in line.cells.values())
        text.compared += encoded
        mask.compared += encoded
        taken.compared += encoded + len(line.refused)
        for fault, columns in line.wrong.items():
            check = text if fault == TEXT else mask
            check.differences += [f"{line.name}, {column}: {fault}" for column in columns]
        taken.differences += [f"{line.name}, {row}: {why}" for row, why in line.refused.items()]
    return [text, mask, taken]


def encoders(shared: Path, names: list[str] | None) -> Iterator[tuple[str, Callable[[], Encoder]]]:
    """The templates by name, each with what opens a fresh encoder."""
    with tempfile.TemporaryDirectory() as work:
        native = NativeTokenizers(shared, Path(work), shared / "templates")
        for path in sorted((shared / "templates").glob("*.jinja")):
            if names is None or path.stem in names:
                source = path.read_text(encoding="utf-8")
                yield path.stem, lambda source=source, path=path: native.encoder(source, path)


def encoded(encoder: Encoder, row: Any) -> Any:
    """What a row comes to: its ids, weights and what is lost; None where it is refused."""
    try:
        example = encoder.encode(row)
    except SftcoreError:
        return None
    return example.input_ids, example.loss_mask, example.lost, example.endless_turns


def are_equal(one: Any, other: Any) -> bool:
    """Whether two encodings are the same."""
    if one is None or other is None:
        return one is other
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


def encoder_checks(shared: Path, names: list[str] | None = None) -> list[Check]:
    """Stops of plain chats, tokens explained, and masks in any order of rows, on one thread and on eight."""
    stops = Check("a turn ends as turn_ends says, with a stop token", "turns")
    explained = Check("explain and encode train the same tokens", "rows")
    order = Check(f"rows in any order, on 1 and {THREADS} threads, have one mask", "rows")
    generator = random.Random(16)
    rows = list(ROWS.items())
    for name, fresh in encoders(shared, names):
        try:
            encoder = fresh()
        except TemplateError:
            continue
        first = {row: encoded(encoder, value) for row, value in rows}
        _check_stops(stops, name, encoder)
        for row, value in rows:
            if first[row] is None:
                continue
            explained.compared += 1
            weights = [token.weight > 0 for token in encoder.explain(value)]
            if weights != first[row][1].tolist():
                explained.differences.append(f"{name}, {row}")
        many = rows * 3
        generator.shuffle(many)
        other, shared_one = fresh(), fresh()
        with ThreadPoolExecutor(THREADS) as pool:
            threaded = list(pool.map(partial(encoded, shared_one), dict(many).values()))
        again = [(row, encoded(other, value)) for row, value in many]
        again += zip(dict(many), threaded, strict=True)
        order.compared += len(again)
        order.differences += [
            f"{name}, {row}" for row, found in again if not are_equal(found, first[row])
        ]
    return [stops, explained, order]


def _check_stops(check: Check, name: str, encoder: Encoder) -> None:
    try:
        example = encoder.encode(ROWS["two questions"])
    except SftcoreError:
        return
    text = example.text.encode()
    turns = [text[start:end].decode() for start, end, is_trained in example.segments if is_trained]
    ends = encoder.turn_ends
    stops = encoder.stop_token_ids
    for turn, end in zip(turns, (ends.inner, ends.last), strict=False):
        if end is None:
            continue
        check.compared += 1
        # tags of a template may take the line break after the end in
        if not turn.rstrip().endswith(end.text):
            check.differences.append(f"{name}: {turn!r} does not end with {end.text!r}")
        elif end.is_token and encoder.tokenize(end.token)[-1] not in stops:
            check.differences.append(f"{name}: {end.token!r} is no stop token")


def run_agents(shared: Path, names: list[str] | None = None) -> list[Check]:
    """All checks, with all shared templates or those of `names`."""
    return page_checks(shared, names) + encoder_checks(shared, names)
