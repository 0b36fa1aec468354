"""A tuned model in other forms."""

from __future__ import annotations

from sftcore.export.merge import merge

__all__ = ["merge"]
