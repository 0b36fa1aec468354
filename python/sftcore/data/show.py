"""Rows of a file as rendered text, for a person to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sftcore import _core
from sftcore.data.encoder import Encoder, load_template

# What a packaged template may read when there is no tokenizer to say its own.
SPECIAL_TOKENS = [("bos_token", "<|im_start|>"), ("eos_token", "<|im_end|>")]


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedRow:
    """One row as text.

    Attributes:
        line: Its line in the file.
        shape: The shape of the rows of its file.
        pieces: The text in order, each piece with whether it is trained.
        num_tokens: Its tokens, where there is a tokenizer to count them.
    """

    line: int
    shape: str
    pieces: list[tuple[str, bool]]
    num_tokens: int | None


def render_rows(
    path: Path, *, template: str, model: str | Path | None = None, limit: int
) -> list[RenderedRow]:
    """Renders the first rows of a file.

    Args:
        path: A data file.
        template: `auto` (the model's own, ChatML without a model), a packaged name, or a `.jinja` file.
        model: A model folder.
        limit: How many rows.

    Raises:
        RowError: A row is wrong.
        FileNotFoundError: There is no such file.
    """
    if model is not None:
        encoder = Encoder.from_pretrained(model, template=template)
        rows = encoder._core.render_file(path, limit)
    else:
        source = load_template("chatml" if template == "auto" else template)
        rows = _core.Template(source or "", SPECIAL_TOKENS).render_file(path, limit)
    shape = _core.Template.shape_of(path)
    return [
        RenderedRow(line=line, shape=shape, pieces=cut(text, segments), num_tokens=num_tokens)
        for line, text, segments, num_tokens in rows
    ]


def cut(text: str, segments: list[tuple[int, int, bool]]) -> list[tuple[str, bool]]:
    """Cuts a text at its segments, whose places are bytes of its UTF-8 form."""
    encoded = text.encode()
    return [(encoded[start:end].decode(), trained) for start, end, trained in segments]
