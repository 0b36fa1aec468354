"""Rows on disk to batches: `Encoder`, `BatchLoader` and `StreamLoader`.

The only part of the package that talks to the Rust core. It needs numpy alone; torch is imported
when a loader is asked for tensors.
"""

from __future__ import annotations

from sftcore._core import __version__
from sftcore.data.encoder import Encoder, Example, load_template
from sftcore.data.ledger import LedgerEntry, append_ledger, read_ledger
from sftcore.data.loader import BatchLoader, Split
from sftcore.data.plan import Overlap
from sftcore.data.registry import DatasetEntry, Registry, register_dataset
from sftcore.data.rewrite import ModelNames
from sftcore.data.show import RenderedRow, render_rows
from sftcore.data.sources import DatasetSource, open_registry, resolve_sources
from sftcore.data.stream import StreamLoader
from sftcore.data.templates import TemplateView, list_templates, view_template

__all__ = [
    "BatchLoader",
    "DatasetEntry",
    "DatasetSource",
    "Encoder",
    "Example",
    "LedgerEntry",
    "ModelNames",
    "Overlap",
    "Registry",
    "RenderedRow",
    "Split",
    "StreamLoader",
    "TemplateView",
    "__version__",
    "append_ledger",
    "list_templates",
    "load_template",
    "open_registry",
    "read_ledger",
    "register_dataset",
    "render_rows",
    "resolve_sources",
    "view_template",
]
