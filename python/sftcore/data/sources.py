"""What a user names as data sets to the files that the core reads.

Paths, folders, patterns, `-` for the standard input, addresses of the web, registered names and ids of
hubs, each with `#N` for N rows. A path that exists goes before every other reading. What is left out on
the way is in the notes of the source, for the report of the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sftcore.config.schema import did_you_mean
from sftcore.data.dataset_info import read_dataset_info
from sftcore.data.folders import expand_glob, is_glob, list_folder, near_names
from sftcore.data.hub import Hub, fetch_from_hub, fetch_url, shown_address
from sftcore.data.kinds import kind_of
from sftcore.data.reference import Reference, find_path, is_hub_id, parse_reference
from sftcore.data.registry import (
    DatasetEntry,
    Registry,
    packaged_entries,
    registered_entries,
)
from sftcore.data.rewrite import ModelNames, fill_names, join_keys
from sftcore.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSource:
    """One data set as the core reads it.

    Attributes:
        name: What reports call it: the registered name, or the path as it was typed, without `#N`.
        files: The files in order; `Path("-")` alone for the standard input.
        sample: The rows to draw; None for all.
        columns: Keys of a row to the keys they stand for; `tags` may say how its messages are written.
        weight: Its share in a mix; None where it has none of its own.
        notes: What was left out, and what a user should know.
    """

    name: str
    files: tuple[Path, ...]
    sample: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None
    notes: tuple[str, ...] = ()


def open_registry(dataset_info: Sequence[str | Path] = ()) -> Registry:
    """Returns all names there are: the packaged ones, those registered in code, those of files.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: A file is wrong.
    """
    entries = [*packaged_entries(), *registered_entries()]
    for path in dataset_info:
        entries += read_dataset_info(path)
    return Registry(entries)


def resolve_sources(
    datasets: Sequence[str | Path | DatasetSource],
    *,
    dataset_info: Sequence[str | Path] = (),
    columns: Mapping[str, str] | None = None,
    use_hf: bool | None = None,
    names: ModelNames | None = None,
) -> list[DatasetSource]:
    """Finds the files of data sets, fetching what lies elsewhere.

    Args:
        datasets: What a user names; a `Path` is a path alone, a `DatasetSource` is taken as it is.
        dataset_info: Files that register more names.
        columns: Keys of a row to the keys they stand for, in what has no columns of its own.
        use_hf: Which hub an id without `hf::` or `ms::` belongs to; None asks USE_HF, and takes the
            Hugging Face hub where a data set is on both.
        names: Fills the names in self-cognition in.

    Raises:
        ConfigError: A name is unknown, nothing fits, or what lies elsewhere cannot be had.
        FileNotFoundError: There is no such file.
    """
    registry = open_registry(dataset_info)
    resolver = _Resolver(
        registry=registry, use_hf=_asked_hub() if use_hf is None else use_hf, names=names
    )
    sources = []
    unmapped = []
    for dataset in datasets:
        source, has_own_columns = resolver.resolve(dataset)
        if columns and has_own_columns:
            unmapped.append(source.name)
            note = f"{source.name}: has columns of its own, so --columns does not apply to it"
            source = replace(source, notes=(*source.notes, note))
        elif columns:
            source = replace(source, columns=dict(columns))
        sources.append(source)
    if columns and len(unmapped) == len(sources):
        raise ConfigError(
            f"--columns has no effect: {', '.join(unmapped) or 'no data set'} have columns of their own"
        )
    return _with_doubles(sources)


def local_files(entry: DatasetEntry) -> tuple[list[Path], list[str]]:
    """Returns the files here that an entry is made of, and notes on those that are left out.

    Raises:
        FileNotFoundError: One of them does not exist.
        ConfigError: A folder or pattern holds no file of rows.
    """
    files: list[Path] = []
    notes: list[str] = []
    for text in entry.files:
        if _is_url(text):
            continue
        path = (entry.folder or Path()) / Path(text).expanduser()
        if path.is_dir():
            found, more = list_folder(path)
        elif path.exists():
            found, more = [path], []
        elif is_glob(text):
            found, more = expand_glob(str(path))
        else:
            raise FileNotFoundError(
                f'{path}: no such file, which {entry.origin} names for the data set "{entry.name}"'
            )
        files += found
        notes += more
    return files, notes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Resolver:
    registry: Registry
    use_hf: bool | None
    names: ModelNames | None

    def resolve(self, dataset: str | Path | DatasetSource) -> tuple[DatasetSource, bool]:
        """Returns a source, and whether it says itself what its columns are."""
        if isinstance(dataset, DatasetSource):
            return dataset, bool(dataset.columns)
        if isinstance(dataset, Path):
            return self._from_path(Reference(kind="path", text=str(dataset))), False
        reference = parse_reference(dataset)
        if reference.kind == "stdin":
            source = DatasetSource(name="-", files=(Path("-"),), sample=reference.sample)
            return source, False
        if reference.kind == "path":
            return self._from_path(reference), False
        if reference.kind == "glob":
            files, notes = expand_glob(reference.text)
            return _source(reference, files, notes), False
        if reference.kind == "url":
            source = _source(reference, [fetch_url(reference.text)], [])
            return replace(source, name=shown_address(reference.text)), False
        if reference.kind in ("hf", "ms"):
            hub: Hub = "hf" if reference.kind == "hf" else "ms"
            return self._from_id(reference, hub)
        return self._from_name(reference)

    def _from_path(self, reference: Reference) -> DatasetSource:
        path = find_path(reference.text)
        if path is None:
            raise _no_such_file(reference.text)
        if path.is_dir():
            files, notes = list_folder(path)
        else:
            files, notes = [path], []
        if self.registry.find(reference.text):
            notes.append(
                f'{reference.text}: is a path here, so the data set "{reference.text}" is not meant'
            )
        return _source(reference, files, notes)

    def _from_name(self, reference: Reference) -> tuple[DatasetSource, bool]:
        entry = self.registry.find(reference.text)
        if entry is not None:
            return self._from_entry(reference, entry, None)
        if is_hub_id(reference.text) and kind_of(reference.text) is None:
            return self._from_id(reference, None)
        if "/" in reference.text or "\\" in reference.text or "." in reference.text:
            raise _no_such_file(reference.shown)
        known = self.registry.names()
        raise ConfigError(
            f'dataset "{reference.text}" is unknown: no such file, and not one of the {len(known)} names of '
            f"sftcore datasets list{did_you_mean(reference.text, known)}"
        )

    def _from_id(self, reference: Reference, hub: Hub | None) -> tuple[DatasetSource, bool]:
        entry = self.registry.find_id(reference.text)
        if entry is not None and not (hub and _id_on(entry, hub) is None):
            # an id says the hub too, where the other one calls the data set otherwise
            said = hub or self._hub_of_id(entry, reference.text)
            return self._from_entry(reference, entry, said)
        if hub is None:
            hub = "ms" if self.use_hf is False else "hf"
        files = fetch_from_hub(hub, reference.text, subsets=reference.subsets)
        return _source(reference, files, []), False

    def _hub_of_id(self, entry: DatasetEntry, hub_id: str) -> Hub | None:
        ids = [(entry.hf_id or "").lower(), (entry.ms_id or "").lower()]
        if ids[0] == ids[1]:
            return None
        return "hf" if hub_id.lower() == ids[0] else "ms"

    def _from_entry(
        self, reference: Reference, entry: DatasetEntry, hub: Hub | None
    ) -> tuple[DatasetSource, bool]:
        subsets = reference.subsets or entry.subset
        if entry.files and reference.subsets:
            raise ConfigError(
                f'dataset "{reference.shown}": "{entry.name}" is made of files, so it has no subsets'
            )
        if entry.subsets:
            for subset in reference.subsets:
                if subset not in (*entry.subsets, "all"):
                    raise ConfigError(
                        f'dataset "{entry.name}" has no subset "{subset}"; expected '
                        f"{', '.join(entry.subsets)} or all{did_you_mean(subset, entry.subsets)}"
                    )
        files, notes = self._files_of(entry, subsets, hub, is_asked=bool(reference.subsets))
        if entry.fill_names:
            files = [fill_names(file, self._names_for(entry)) for file in files]
        if entry.join:
            files = [join_keys(file, entry.join) for file in files]
        source = DatasetSource(
            name=reference.shown,
            files=tuple(files),
            sample=reference.sample or entry.sample,
            columns=entry.columns,
            weight=entry.weight,
            notes=(*entry.notes, *notes),
        )
        return source, bool(entry.columns) or entry.is_packaged

    def _files_of(
        self, entry: DatasetEntry, subsets: Sequence[str], hub: Hub | None, *, is_asked: bool
    ) -> tuple[list[Path], list[str]]:
        if not entry.files:
            hub = hub or self._hub_of(entry)
            hub_id = _id_on(entry, hub) or ""
            # the folder is that of the subset which is read where none is asked for
            folder = None if is_asked else entry.hub_folder
            found = fetch_from_hub(hub, hub_id, subsets=subsets, split=entry.split, folder=folder)
            return found, []
        files, notes = local_files(entry)
        files += [fetch_url(text) for text in entry.files if _is_url(text)]
        return files, notes

    def _hub_of(self, entry: DatasetEntry) -> Hub:
        if entry.hf_id is None or (self.use_hf is False and entry.ms_id is not None):
            return "ms"
        return "hf"

    def _names_for(self, entry: DatasetEntry) -> ModelNames:
        if self.names is None:
            raise ConfigError(
                f"--dataset {entry.name} needs --model_name and --model_author, for example --model_name 小松 Sofie "
                f'--model_author 松果实验室 "Pinecone Lab"'
            )
        return self.names


def _source(reference: Reference, files: list[Path], notes: list[str]) -> DatasetSource:
    return DatasetSource(
        name=reference.shown, files=tuple(files), sample=reference.sample, notes=tuple(notes)
    )


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _id_on(entry: DatasetEntry, hub: Hub) -> str | None:
    return entry.hf_id if hub == "hf" else entry.ms_id


def _asked_hub() -> bool | None:
    for variable, is_hf in (("USE_HF", True), ("USE_MODELSCOPE_HUB", False)):
        value = os.environ.get(variable, "").lower()
        if value in ("1", "true", "yes", "on"):
            return is_hf
        if value in ("0", "false", "no", "off") and is_hf:
            return False
    return None


def _no_such_file(text: str) -> FileNotFoundError:
    near = near_names(Path(text))
    return FileNotFoundError(
        f"{text}: no such file or folder{did_you_mean(Path(text).name, near)}; check the path, or name a data set of "
        "sftcore datasets list"
    )


def _with_doubles(sources: list[DatasetSource]) -> list[DatasetSource]:
    """Adds a note to a source whose file an earlier one has too."""
    owners: dict[Path, str] = {}
    noted = []
    for source in sources:
        doubles = [file for file in source.files if file.absolute() in owners]
        if doubles:
            first = doubles[0].absolute()
            note = (
                f"{source.name}: {len(doubles)} of its files are in {owners[first]} too (the first: {first}), so their "
                "rows count twice"
            )
            source = replace(source, notes=(*source.notes, note))
        owners.update({file.absolute(): source.name for file in source.files})
        noted.append(source)
    return noted
