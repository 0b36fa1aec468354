"""Rows of JSON files one by one, for what is done to rows before the core reads them.

JSON Lines and JSON arrays, plain or gzip. A row keeps the number of its line; no more than one row and a
buffer are held. What trains is read by the core; this is for filling in names, joining keys and a look
at the first row.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sftcore.data.kinds import kind_of
from sftcore.errors import RowError

# a longer row is an error, as in the core
_MAX_ROW_CHARACTERS = 256 << 20
_BUFFER = 1 << 20
_BLANK = " \t\r\n"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of the keys of a JSON object, refusing a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f'the key "{twice}" stands twice')
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


_decoder = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_refuse)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a file, each with its line.

    Raises:
        RowError: The file is of another kind, or a row is no JSON object.
    """
    if kind_of(path) not in (".jsonl", ".ndjson", ".json") or path.suffix.lower() == ".zst":
        raise RowError(
            f"{path}: a file of kind {path.suffix}; expected .jsonl or .json, plain or .gz",
            path=str(path),
        )
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            line, text = _first_line(file)
            read = _array if text.lstrip().startswith("[") else _lines
            yield from read(path, file, line, text)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RowError(f"{path}: the file cannot be read: {error}", path=str(path)) from error


def first_keys(path: Path) -> list[str]:
    """Returns the keys of the first row of a file, of a table those of its header.

    Empty where only the core can read them.

    Raises:
        RowError: The first row is wrong.
    """
    kind = kind_of(path)
    if kind in (".csv", ".tsv") and path.suffix.lower() == kind:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = file.readline(_BUFFER)
        return next(csv.reader([header], delimiter="\t" if kind == ".tsv" else ","), [])
    if kind not in (".jsonl", ".ndjson", ".json") or path.suffix.lower() == ".zst":
        return []
    return list(next((row for _, row in read_rows(path)), {}))


def _first_line(file: TextIO) -> tuple[int, str]:
    line = 1
    while (text := file.readline(_BUFFER)) and not text.strip():
        line += text.endswith("\n")
    return line, text


def _lines(path: Path, file: TextIO, line: int, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    while text:
        if not text.endswith("\n"):
            text += file.readline(_MAX_ROW_CHARACTERS)
        if len(text) > _MAX_ROW_CHARACTERS:
            raise _wrong(path, line, f"the row is over {_MAX_ROW_CHARACTERS} characters")
        if text.strip():
            try:
                row = _decoder.decode(text.strip())
            except (ValueError, RecursionError) as error:
                raise _wrong(path, line, f"not JSON: {error}") from error
            yield line, _object(path, line, row)
        line += 1
        text = file.readline(_BUFFER)


def _array(path: Path, file: TextIO, line: int, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    buffer, after = text.lstrip()[1:], "["
    line += text[: len(text) - len(text.lstrip())].count("\n")
    while True:
        rest = buffer.lstrip(_BLANK)
        line += buffer.count("\n", 0, len(buffer) - len(rest))
        buffer = rest
        if not buffer:
            if not (buffer := file.read(_BUFFER)):
                raise _wrong(path, line, "the array breaks off; expected ] at its end")
        elif buffer[0] == "]" and after != ",":
            return
        elif buffer[0] == "," and after == "}":
            buffer, after = buffer[1:], ","
        elif buffer[0] == "{" and after != "}":
            row, end, buffer = _decode(path, file, line, buffer)
            yield line, row
            line += buffer.count("\n", 0, end)
            buffer, after = buffer[end:], "}"
        else:
            raise _wrong(
                path, line, f"found {buffer[0]!r} after {after!r}; expected an array of rows"
            )


def _decode(path: Path, file: TextIO, line: int, buffer: str) -> tuple[dict[str, Any], int, str]:
    """Decodes a row at the start of the buffer, reading on where it ends later.

    As much is read again as there is, so that a long row is not tried at every piece of it.
    """
    while (found := _try_decode(buffer)) is None:
        more = file.read(max(_BUFFER, len(buffer)))
        if not more or len(buffer) > _MAX_ROW_CHARACTERS:
            raise _wrong(path, line, "not JSON, or the row breaks off")
        buffer += more
    return _object(path, line, found[0]), found[1], buffer


def _try_decode(text: str) -> tuple[Any, int] | None:
    try:
        return _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None


def _object(path: Path, line: int, row: Any) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise _wrong(path, line, f"a row is of type {type(row).__name__}; expected a JSON object")


def _wrong(path: Path, line: int, what: str) -> RowError:
    return RowError(f"{path}:{line}: {what}", path=str(path), line=line)
