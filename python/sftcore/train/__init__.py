"""Batches to a tuned model."""

from __future__ import annotations

from sftcore.train.run import train

__all__ = ["train"]
