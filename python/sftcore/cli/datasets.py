"""`sftcore datasets`: which data sets have a name, and what stands behind one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from sftcore.data import DatasetEntry, Registry

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore datasets list --language zh --tag math
  sftcore datasets search code python
  sftcore datasets show gsm8k                          where it lies, and how its rows are read
  sftcore datasets show my_set --dataset_info my.toml  one of your own, with the keys of its first row
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "datasets",
        help="list, search and show data sets by name",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = _add(actions, "list", "the names, each with what it is")
    listing.add_argument("--tag", metavar="WORD", help="those for one use, like math or agent")
    listing.add_argument("--language", metavar="CODE", help="those in one language, like en or zh")
    listing.set_defaults(run=run_list)
    search = _add(actions, "search", "the names that have all of some words")
    search.add_argument("words", nargs="+", metavar="WORD", help="a part of a name, an id or a use")
    search.set_defaults(run=run_search)
    show = _add(actions, "show", "where a data set lies, and how its rows are read")
    show.add_argument("name", metavar="NAME", help="a name, or a file, folder or pattern")
    show.set_defaults(run=run_show)


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=text,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset_info",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that names more data sets",
    )
    return parser


def run_list(known: argparse.Namespace) -> None:
    """Runs `datasets list`."""
    entries = [
        entry
        for entry in _registry(known).entries.values()
        if (known.tag is None or known.tag in entry.tags)
        and (known.language is None or known.language in entry.language)
    ]
    if not entries:
        raise ConfigError("no data set has this tag and language; see sftcore datasets list")
    _print_lines(entries)


def run_search(known: argparse.Namespace) -> None:
    """Runs `datasets search`."""
    registry = _registry(known)
    entries = registry.search(known.words)
    if not entries:
        wanted = " ".join(known.words)
        raise ConfigError(
            f'no data set has "{wanted}" in its name, ids or uses{did_you_mean(wanted, registry.names())}'
        )
    _print_lines(entries)


def run_show(known: argparse.Namespace) -> None:
    """Runs `datasets show`."""
    from sftcore.data.reference import find_path, parse_reference
    from sftcore.data.sources import local_files, resolve_sources

    reference = parse_reference(known.name)
    registry = _registry(known)
    entry = registry.find(reference.text) or registry.find_id(reference.text)
    if entry is None or find_path(known.name):
        if reference.kind in ("hf", "ms") or reference.kind == "url":
            raise ConfigError(
                f"{known.name}: lies elsewhere and is not registered, so that nothing is known of it here"
            )
        if reference.kind != "glob" and not find_path(reference.text):
            raise ConfigError(
                f'data set "{known.name}" is unknown: no such file, and not one of sftcore datasets list'
                f"{did_you_mean(reference.text, registry.names())}"
            )
        (source,) = resolve_sources([known.name], dataset_info=known.dataset_info)
        _print_notes(source.notes)
        _print_files(source.files)
        return
    _print_entry(entry)
    _print_notes(entry.notes)
    files, notes = local_files(entry)
    _print_notes(notes)
    _print_files(files)


def _registry(known: argparse.Namespace) -> Registry:
    from sftcore.data import open_registry

    return open_registry(known.dataset_info)


def _print_lines(entries: Iterable[DatasetEntry]) -> None:
    lines = [(entry.name, entry.description) for entry in entries]
    width = max(len(name) for name, _ in lines) + 2
    for name, description in lines:
        print(f"{name:<{width}}{description}".rstrip())


def _print_entry(entry: DatasetEntry) -> None:
    columns = {key: meant for key, meant in entry.columns.items() if key != "tags"}
    tags = entry.columns.get("tags", {})
    lines = {
        "": entry.description,
        "other names": ", ".join(entry.aliases),
        "registered in": entry.origin,
        "Hugging Face": entry.hf_id,
        "ModelScope": entry.ms_id,
        "folder": entry.hub_folder,
        "subset": ", ".join(entry.subset),
        "subsets": ", ".join(entry.subsets),
        "split": "" if entry.files else entry.split,
        "columns": ", ".join(f"{key} as {meant}" for key, meant in columns.items()),
        "messages": ", ".join(f"{key} {value}" for key, value in tags.items()),
        "joined": ", ".join(f"{key} = {text!r}" for key, text in entry.join.items()),
        "rows drawn": entry.sample,
        "weight": entry.weight,
        "language": ", ".join(entry.language),
        "licence": entry.license,
        "tags": ", ".join(entry.tags),
    }
    print(entry.name)
    for label, value in lines.items():
        if value:
            print(f"  {label:<15}{value}" if label else f"  {value}")


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"  note: {note}")


def _print_files(files: Iterable[Path]) -> None:
    from sftcore.data.rows import first_keys

    for file in files:
        keys = first_keys(file)
        print(f"  {file}" + (f": {', '.join(keys)}" if keys else ""))
