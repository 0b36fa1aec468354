"""Rows that are changed before they are trained: keys put together of others, and names filled in.

The changed rows are written into the cache folder, under a name that says what they were made of, so
that a resumed run finds the very same file. A file that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftcore.config.folders import cache_folder
from sftcore.data.kinds import stem_of
from sftcore.data.registry import joined_keys
from sftcore.data.rows import read_rows
from sftcore.errors import ConfigError, RowError

_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNames:
    """What a model that learns who it is calls itself, and who made it.

    Attributes:
        model_name: One name, or a Chinese and an English one.
        model_author: The same, of its maker.
    """

    model_name: tuple[str, ...]
    model_author: tuple[str, ...]

    def __post_init__(self) -> None:
        for setting in ("model_name", "model_author"):
            if len(getattr(self, setting)) not in (1, 2):
                raise ConfigError(f"--{setting} takes one name, or a Chinese and an English one")


def join_keys(path: Path, join: Mapping[str, str]) -> Path:
    """Returns a copy of a file in which keys are put together of others.

    Args:
        path: A `.jsonl` or `.json` file, plain or `.gz`.
        join: The keys, and the texts with the names of others in braces.

    Raises:
        RowError: A row lacks a key, or has no text or number there.
    """
    parts = {key: joined_keys(text, place=f'join of "{key}"') for key, text in join.items()}
    status = path.stat()
    made_of = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{json.dumps(dict(join))}:1"
    rows = (_joined(path, line, row, parts) for line, row in read_rows(path))
    return _write_once(stem_of(path), made_of, rows)


def fill_names(path: Path, names: ModelNames) -> Path:
    """Returns a copy of a file in which `{{NAME}}` and `{{AUTHOR}}` are filled in."""
    rows = [_filled(row, names) for _, row in read_rows(path)]
    made_of = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return _write_once(stem_of(path), made_of, iter(rows))


def _joined(
    path: Path,
    line: int,
    row: dict[str, Any],
    parts: Mapping[str, list[tuple[str, str | None]]],
) -> dict[str, Any]:
    joined = {
        key: "".join(
            literal + ("" if source is None else _text_of(path, line, row, source))
            for literal, source in pieces
        )
        for key, pieces in parts.items()
    }
    return {**row, **joined}


def _text_of(path: Path, line: int, row: dict[str, Any], key: str) -> str:
    place = f"{path}:{line}"
    if key not in row:
        raise RowError(
            f'{place}: the row has no "{key}" (found keys: {", ".join(row)}), which the data set joins with others',
            path=str(path),
            line=line,
        )
    value = row[key]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError(
        f'{place}: "{key}" is {json.dumps(value)[:80]}; expected a text or a number to join with others',
        path=str(path),
        line=line,
    )


def _filled(row: dict[str, Any], names: ModelNames) -> dict[str, Any]:
    # one name stands for both languages, of two the first is the Chinese one
    place = 0 if row.get("language") == "zh" else -1
    texts = {
        key: value.replace("{{NAME}}", names.model_name[place]).replace(
            "{{AUTHOR}}", names.model_author[place]
        )
        for key, value in row.items()
        if isinstance(value, str)
    }
    return {**row, **texts}


def _write_once(name: str, made_of: str, rows: Iterator[dict[str, Any]]) -> Path:
    folder = cache_folder() / "datasets"
    # names of files and rows may hold half a surrogate pair
    key = hashlib.sha256(made_of.encode(errors="surrogatepass")).hexdigest()[:12]
    path = folder / f"{name}-{key}.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(_encoded(rows))
        # whole or not there, also for processes that write it at the same time
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _encoded(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        if _HALF_PAIR.search(text):  # which has no form in UTF-8, but one in JSON
            text = json.dumps(row)
        yield f"{text}\n".encode()
