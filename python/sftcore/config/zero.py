"""The value of `--deepspeed` to DeepSpeed's own settings, as yet with `auto` for what other settings say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError

# Rajbhandari et al. 2020, arXiv:1910.02054: 1 shards the optimizer, 2 gradients too, 3 parameters too
_STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
_OFFLOADED = {
    "zero2_offload": (2, ("offload_optimizer",)),
    "zero3_offload": (3, ("offload_optimizer", "offload_param")),
}
_OLD_NAMES = {f"default_{name}": name for name in ("zero2", "zero3")}
_OF_HIDDEN_SIZE = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)


def read_deepspeed(value: str) -> dict[str, Any]:
    """Returns the settings that a name, a JSON file or a JSON object stands for.

    Raises:
        ConfigError: It is none of these.
    """
    name = value.replace("-", "_")
    name = _OLD_NAMES.get(name, name)
    if name in _STAGES:
        return _preset(_STAGES[name], ())
    if name in _OFFLOADED:
        return _preset(*_OFFLOADED[name])
    is_object = value.lstrip().startswith("{")
    if not is_object and not Path(value).is_file():
        names = {*_STAGES, *_OFFLOADED}
        raise ConfigError(
            f"--deepspeed {value} is neither a name nor a file; expected one of {', '.join(sorted(names))}, a JSON "
            f"file of DeepSpeed's settings, or a JSON object{did_you_mean(name, names)}"
        )
    try:
        settings = json.loads(value if is_object else Path(value).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--deepspeed {value} is no JSON: {error}") from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(
            f"--deepspeed {value} has no stage of ZeRO; expected "
            '{"zero_optimization": {"stage": 2}} with a stage of 0 to 3, and what else DeepSpeed takes'
        )
    found: dict[str, Any] = settings
    return found


def _preset(stage: int, offloaded: tuple[str, ...]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = "auto"
    if stage == 3:
        zero |= dict.fromkeys(_OF_HIDDEN_SIZE, "auto")
    zero |= {part: {"device": "cpu", "pin_memory": True} for part in offloaded}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def fill_sizes(settings: dict[str, Any], hidden_size: int) -> None:
    """Puts numbers in place of `auto` where it stands for something that follows from the width of the model.

    Args:
        settings: Of DeepSpeed; changed in place.
        hidden_size: The width of the hidden states.
    """
    zero = settings["zero_optimization"]
    sizes = (hidden_size**2, int(0.9 * hidden_size**2), 10 * hidden_size)
    for name, size in zip(_OF_HIDDEN_SIZE, sizes, strict=True):
        if zero.get(name) == "auto":
            zero[name] = size
