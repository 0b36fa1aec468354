"""`python -m sftcore.cli`, for launchers that start modules."""

from __future__ import annotations

from sftcore.cli import run

run()
