"""The command line: `sftcore COMMAND`. A command loads what it needs when it runs."""

from __future__ import annotations

from sftcore.cli.main import main, run

__all__ = ["main", "run"]
