"""From the name of a model to a folder, and from a folder to a model."""

from __future__ import annotations

from sftcore.models.loading import load_model, load_settings, pick_dtype, quieten
from sftcore.models.registry import resolve_model

__all__ = ["load_model", "load_settings", "pick_dtype", "quieten", "resolve_model"]
