"""How fast training goes, by model, layout and length, and TRL on the same rows."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

from gpu.cases import Cases
from gpu.measure import run_ours, run_trl
from gpu.shapes import make_rows, make_shape, on_gpu

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "padding-free": {"padding_free": True},
}
# the longer one with as many tokens a step
SHORT, LONG = (2048, 8192) if on_gpu() else (256, 512)
_RUNS = [
    ("lora", "1B", SHORT),
    ("lora", "8B", SHORT),
    ("full", "1B", SHORT),
    ("lora", "1B", LONG),
    ("lora", "8B", LONG),
    ("full", "1B", LONG),
]
# TRL, after what it needs that is too large for the pack
_OF_TRL = ("pyarrow", "pandas", "datasets", "trl")


def speed(pack: Path, work: Path) -> int:
    """Measures sftcore, the default of each model first."""
    calls = {}
    for tuner, model, length in _RUNS:
        for layout, more in LAYOUTS.items():
            settings = {"tuner_type": tuner, "max_length": length, **more}
            settings["per_device_train_batch_size"] = 4 * SHORT // length
            calls[f"{tuner} {model}, {length} tokens, {layout}"] = model, length, settings
    cases = Cases(work / "speed.json", calls)
    for name, (model, length, settings) in calls.items():
        if not on_gpu() and (model, length) != ("1B", SHORT):
            cases.note(name, "skipped", reason="needs a GPU: without one all shapes are as small")
            continue
        shape = make_shape(model, pack, work)
        rows = make_rows(pack, work / f"{length}.jsonl", max_length=length, count=200)
        cases.run(name, partial(run_ours, shape, rows, work / "speed", **settings))
    return cases.exit_code()


def trl(pack: Path, work: Path) -> int:
    """Measures TRL at its defaults and with what makes it fastest, each beside sftcore's like."""
    packed: dict[str, Any] = {"packing": True}
    whole: dict[str, Any] = {"gradient_checkpointing": False}
    flash = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    # its default loss takes the head a chunk at a time
    theirs = {
        "TRL, its defaults": {},
        f"TRL, packing, {flash}": packed | {"attention": flash},
        f"TRL, packing, {flash}, no checkpointing": packed | whole | {"attention": flash},
    }
    ours = {
        "sftcore, its defaults": {},
        "sftcore, packing": packed,
        "sftcore, packing, no checkpointing": packed | whole,
    }
    pairs = list(zip(theirs.items(), ours.items(), strict=True))
    cases = Cases(work / "trl.json", [name for pair in pairs for name, _ in pair])
    missing = next((name for name in _OF_TRL if importlib.util.find_spec(name) is None), None)
    shape = make_shape("1B", pack, work)
    rows = make_rows(pack, work / "trl.jsonl", max_length=SHORT, count=200)
    for pair in pairs:
        for (name, more), run in zip(pair, (run_trl, run_ours), strict=True):
            if missing:
                reason = f"{missing} is not on this machine"
                if run is run_ours:
                    reason += ", so TRL does not run beside it"
                cases.note(name, "skipped", reason=reason)
                continue
            cases.run(name, partial(run, shape, rows, work / "trl", max_length=SHORT, **more))
    return cases.exit_code()
