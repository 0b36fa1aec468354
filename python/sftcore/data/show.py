"""Rows of a file as rendered text, for a person to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sftcore import _core
from sftcore.data.encoder import load_template

# What a packaged template may read when there is no tokenizer to say its own.
_SPECIAL_TOKENS = [("bos_token", "<|im_start|>"), ("eos_token", "<|im_end|>")]


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedRow:
    """One row as text.

    Attributes:
        line: Its line in the file.
        pieces: The text in order, each piece with whether it is trained.
    """

    line: int
    pieces: list[tuple[str, bool]]


def shape_of(path: Path) -> str:
    """Returns the shape of the rows of a file."""
    return _core.Template.shape_of(path)


def render_rows(path: Path, *, template: str, limit: int) -> list[RenderedRow]:
    """Renders the first rows of a file with a packaged template or a `.jinja` file.

    Raises:
        RowError: A row is wrong.
        FileNotFoundError: There is no such file.
    """
    source = load_template(template) or load_template("chatml")
    compiled = _core.Template(source or "", _SPECIAL_TOKENS)
    return [
        RenderedRow(line=line, pieces=pieces_of(text, segments))
        for line, text, segments in compiled.render_file(path, limit)
    ]


def pieces_of(text: str, segments: list[tuple[int, int, bool]]) -> list[tuple[str, bool]]:
    """Cuts a text at its segments, whose places are bytes of its UTF-8 form."""
    encoded = text.encode()
    return [(encoded[start:end].decode(), trained) for start, end, trained in segments]
