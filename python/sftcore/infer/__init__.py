"""Questions to answers, rendered as training rendered them."""

from __future__ import annotations

from sftcore.infer.run import infer

__all__ = ["infer"]
