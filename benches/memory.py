"""The memory that a dry run estimates beside what the run then takes.

    python benches/memory.py [--model smollm2-135m] [--steps 3]

Each case runs in a process of its own. On a CPU the measure is the highest resident memory while steps run, less
that of the process before the model was loaded; on a GPU that of torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "LoRA, 1 row": {"tuner_type": "lora", "per_device_train_batch_size": 1},
    "LoRA, 4 rows": {"tuner_type": "lora"},
    "LoRA, 4 rows, no checkpointing": {"tuner_type": "lora", "gradient_checkpointing": False},
    "LoRA, 4 rows, plain loss": {"tuner_type": "lora", "loss_impl": "plain"},
    "LoRA, packs": {"tuner_type": "lora", "packing": True, "per_device_train_batch_size": 2},
    "full, 1 row": {"tuner_type": "full", "per_device_train_batch_size": 1},
    "full, 4 rows": {"tuner_type": "full"},
    "full, 4 rows, no checkpointing": {"tuner_type": "full", "gradient_checkpointing": False},
    "full, 4 rows, eager attention": {"tuner_type": "full", "attn_impl": "eager"},
}
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shared", default=os.environ.get("SFTCORE_SHARED", "../shared/data"))
    parser.add_argument("--rows", default="datasets/llamafactory/alpaca_en_demo.json")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", default="target/bench-memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.child:
        print(json.dumps(measure(json.loads(known.child))))
        return 0
    print("| run | estimate | measured | estimate / measured |")
    print("|---|---|---|---|")
    for name in known.cases:
        settings = {
            "model": known.model,
            "dataset": [str(Path(known.shared) / known.rows)],
            "output_dir": str(Path(known.work) / name.replace(" ", "-").replace(",", "")),
            "add_version": False,
            "split_dataset_ratio": 0.0,
            "max_length": known.max_length,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": known.steps,
            "disable_tqdm": True,
            "report_to": ["none"],
            "test_oom": True,
            **CASES[name],
        }
        command = [sys.executable, __file__, "--child", json.dumps(settings)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(ran.stdout.splitlines()[-1])
        estimate, measured = found["estimate"] / GIB, found["measured"] / GIB
        print(
            f"| {name} | {estimate:.2f} GiB | {measured:.2f} GiB | {estimate / measured:.2f} |",
            flush=True,
        )
    return 0


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Runs a dry run in a process of its own, then the run here."""
    import torch

    from sftcore.config import TrainConfig, build
    from sftcore.train import run
    from sftcore.train.speed import MeasureSpeed, peak_memory

    dry = {**{key: value for key, value in settings.items() if key != "test_oom"}, "dry_run": True}
    script = (
        "import json, sys\nfrom sftcore.config import TrainConfig, build\nfrom sftcore.train import train\n"
        "train(build(TrainConfig, json.loads(sys.argv[1]), origin='bench'))"
    )
    plan = subprocess.run(
        [sys.executable, "-c", script, json.dumps({**dry, "dry_run_json": "-"})],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    estimate = json.loads(plan.stdout)["memory"]["estimate"]["peak"]
    base = 0.0 if torch.cuda.is_available() else resident("VmRSS:")
    begin = MeasureSpeed.on_train_begin

    def forget_loading(self: Any, *arguments: Any, **named: Any) -> None:
        # the peak so far is that of loading the weights
        Path("/proc/self/clear_refs").write_text("5")
        begin(self, *arguments, **named)

    MeasureSpeed.on_train_begin = forget_loading  # type: ignore[method-assign]
    run.train(build(TrainConfig, settings, origin="bench"))
    return {"estimate": estimate, "measured": peak_memory() - base}


def resident(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(
        1024.0 * int(line.split()[1]) for line in status.splitlines() if line.startswith(name)
    )


if __name__ == "__main__":
    sys.exit(main())
