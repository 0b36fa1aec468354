"""What a GPU proves of sftcore, in parts of their own time.

    python benches/gpu_check.py --pack .gpu [--parts first speed]

`.gpu` holds `data/tokenizers/smollm2` and `data/datasets/gsm8k/train.jsonl`. Models are made at random. Without a
GPU a tiny shape goes through every part. Results go to `$OUT/gpu-check.json`, or to `--out`, after each case.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.runner import SKIPPED, Part, run_parts, write_whole

SECONDS = {"versions": 40.0, "first": 60.0, "speed": 220.0, "trl": 100.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, default=Path(".gpu"))
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--seconds", type=float, default=480.0, help="the most that all parts take")
    parser.add_argument("--work", type=Path, default=Path("target/gpu-check"))
    out = Path(os.environ.get("OUT", ".")) / "gpu-check.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work.resolve()
    if options.part:
        return _part(options.part, options.pack.resolve(), work)
    words = ["--pack", str(options.pack), "--work", str(work)]
    parts = [
        Part(
            name=name,
            command=[sys.executable, __file__, *words, "--part", name],
            seconds=SECONDS[name],
        )
        for name in options.parts
    ]
    found = run_parts(parts, seconds=options.seconds, work=work, out=options.out, about={})
    return 0 if all(one["status"] in ("passed", "skipped") for one in found.values()) else 1


def _part(name: str, pack: Path, work: Path) -> int:
    cases: dict[str, Any] = {}

    def note(case: str, found: dict[str, Any]) -> None:
        cases[case] = found
        write_whole(work / f"{name}.json", cases)

    if name == "versions":
        command = [sys.executable, "-m", "sftcore.cli", "env"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        note("env", {"text": text})
        return 0
    if name == "trl" and importlib.util.find_spec("trl") is None:
        print("trl is not installed")
        return SKIPPED
    from gpu.measure import run_ours, run_trl
    from gpu.shapes import make_rows, make_shape, on_gpu

    short, long = (2048, 8192) if on_gpu() else (512, 1024)
    shape = make_shape("1B", pack, work)
    rows = make_rows(pack, work / f"{name}.jsonl", max_length=short, count=200)
    if name == "first":
        few = make_rows(pack, work / "few.jsonl", max_length=short, count=4)
        losses = run_ours(shape, few, work / name, max_length=short)["losses"]
        note("lora 1B", {"losses": losses})
        if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
            print(f"the loss is not finite or did not fall: {losses}")
            return 1
        return 0
    if name == "trl":
        note("defaults", run_trl(shape, rows, work / name, max_length=short))
        best = {"packing": True, "gradient_checkpointing": False}
        note(
            "packing, no checkpointing", run_trl(shape, rows, work / name, max_length=short, **best)
        )
        return 0
    layouts: dict[str, dict[str, Any]] = {
        "padded": {},
        "packed": {"packing": True},
        "padding-free": {"padding_free": True},
    }
    for model, tuner in (("1B", "lora"), ("8B", "lora"), ("1B", "full")):
        shape = make_shape(model, pack, work)
        for length in (short, long):
            rows = make_rows(pack, work / f"{length}.jsonl", max_length=length, count=200)
            size = {"per_device_train_batch_size": 4 * short // length, "max_length": length}
            for layout, more in layouts.items():
                case = f"{tuner} {model}, {length} tokens, {layout}"
                note(case, run_ours(shape, rows, work / name, tuner_type=tuner, **size, **more))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
