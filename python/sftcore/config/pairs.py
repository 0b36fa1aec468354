"""Settings that hold named values: a JSON object, or pairs like a=1,b=2."""

from __future__ import annotations

import json
import re
from typing import Any

from sftcore.errors import ConfigError


def read_pairs(name: str, text: str, example: str) -> dict[str, Any]:
    """Returns the named values of a setting.

    Args:
        name: The setting, for errors.
        text: A JSON object, or pairs like a=1,b=true,c=word, whose values are numbers, true, false, null or words.
        example: A right value, for errors.

    Raises:
        ConfigError: It is neither.
    """
    try:
        if text.lstrip().startswith("{"):
            values = json.loads(text)
        else:
            pairs = (pair.split("=", 1) for pair in text.split(",") if pair.strip())
            values = {key.strip(): read_word(value.strip()) for key, value in pairs}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--{name} {text} is wrong: expected a JSON object, like {example}, or pairs like a=1,b=true"
        )
    return values


def read_word(word: str) -> Any:
    """Returns a number, true, false or null as what it says, and any other word as it is."""
    lower = word.lower()
    if lower in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(lower)
    if re.fullmatch(r"[+-]?\d+", word):
        return int(word)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word):
        return float(word)
    return word
