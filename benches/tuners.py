"""Real runs of each kind of tuner on one model and the same rows: what they train, reach, take and cost.

    python benches/tuners.py [--steps 40] [--markdown docs/tuners-table.md]

The rows are those of GSM8K under $SFTCORE_SHARED; the last 128 that are drawn are held out. Each run has a process of
its own, one after the other, so that its peak memory is its own. The first row of the table is the model as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import processor

RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    # its matrices are small and its singular values begin at 0, so that it moves at a higher rate alone
    "adalora": {
        "tuner_type": "adalora",
        "adalora_init_r": 12,
        "adalora_target_r": 8,
        "learning_rate": 5e-3,
    },
    "sora": {"tuner_type": "sora", "lora_rank": 12},
    "full": {"tuner_type": "full", "learning_rate": 5e-5},
}
COLUMNS = (
    "tuner",
    "trained parameters",
    "parameters of the saved adapter",
    "held-out loss before",
    "held-out loss after",
    "seconds",
    "peak memory",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shared", default=os.environ.get("SFTCORE_SHARED", "../shared/data"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--held_out", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--work", default="target/bench-tuners")
    parser.add_argument("--markdown", help="where the table goes")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = Path(options.work).resolve()
    if options.run:
        settings = json.loads((work / "settings.json").read_text())
        found = tune(settings, RUNS[options.run], work, options.run)
        (work / f"{options.run}.json").write_text(json.dumps(found))
        return 0
    prepare(options, work)
    figures = {}
    for name in options.runs:
        shutil.rmtree(work / name, ignore_errors=True)  # of an earlier run of this script
        log = work / f"{name}.log"
        command = [sys.executable, __file__, "--run", name, "--work", str(work)]
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
        if code:
            print(f"{name} failed:\n{log.read_text()[-2000:]}")
            return 1
        figures[name] = json.loads((work / f"{name}.json").read_text())
        print(f"{name}: {figures[name]}", flush=True)
    table = markdown(options, figures)
    print(table)
    if options.markdown:
        Path(options.markdown).write_text(table, encoding="utf-8")
    worse = [name for name, found in figures.items() if found["after"] >= found["before"]]
    if worse:
        print(f"no better than the model as it is: {', '.join(worse)}")
    return 1 if worse else 0


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Writes the rows that all runs train and are measured on."""
    work.mkdir(parents=True, exist_ok=True)
    path = Path(options.shared) / "datasets" / "gsm8k" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[: options.rows + options.held_out]
    (work / "train.jsonl").write_text("\n".join(lines[: options.rows]), encoding="utf-8")
    (work / "held_out.jsonl").write_text("\n".join(lines[options.rows :]), encoding="utf-8")
    settings = {
        "model": options.model,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
    }
    (work / "settings.json").write_text(json.dumps(settings))


def tune(settings: dict[str, Any], own: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    """Trains once, and measures the held-out loss of the model before and after."""
    from sftcore.config import TrainConfig
    from sftcore.data import Encoder
    from sftcore.models import load_model, resolve_model
    from sftcore.train import run
    from sftcore.train import train as train_model

    encoder = Encoder.from_pretrained(resolve_model(settings["model"]), max_length=512)
    rows = [encoder.encode(line) for line in (work / "held_out.jsonl").read_text().splitlines()]
    before = loss_of(load_model(resolve_model(settings["model"]), torch_dtype="float32"), rows)
    held: dict[str, Any] = {}
    opened_by = run.open_model

    def open_model(*arguments: Any) -> Any:
        held["opened"] = opened_by(*arguments)
        return held["opened"]

    run.open_model = open_model
    config = TrainConfig(
        **{
            "dataset": [str(work / "train.jsonl")],
            "output_dir": str(work / name),
            "add_version": False,
            "split_dataset_ratio": 0.0,
            "max_length": 512,
            "torch_dtype": "float32",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0.05,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            **settings,
            **own,
        }
    )
    started = time.monotonic()
    train_model(config)
    seconds = time.monotonic() - started
    # in kB, of this process and before the weights of a second model are loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = held["opened"].model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = saved_parameters(work / name / f"checkpoint-{config.max_steps}")
    return {
        "trained": trained,
        "saved": saved,
        "before": before,
        "after": loss_of(model, rows),
        "seconds": seconds,
        "peak_mib": peak,
    }


def loss_of(model: Any, rows: list[Any]) -> float:
    """The mean loss of the trained tokens of all rows, without dropout."""
    import torch

    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids)[None].long().to(device)
        labels = torch.from_numpy(row.labels)[1:].long().to(device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def saved_parameters(checkpoint: Path) -> int:
    """The numbers in the weights that a user carries away."""
    from safetensors import safe_open

    names = ("adapter_model.safetensors", "model.safetensors")
    path = next(checkpoint / name for name in names if (checkpoint / name).is_file())
    with safe_open(path, "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def markdown(options: argparse.Namespace, figures: dict[str, Any]) -> str:
    """The figures as a table, and below it what they were taken on."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += [
        f"| {name} | {found['trained']:,} | {found['saved']:,} | {found['before']:.4f} | {found['after']:.4f} | "
        f"{found['seconds']:.0f} | {found['peak_mib']:,.0f} MiB |"
        for name, found in figures.items()
    ]
    lines += [
        "",
        f"{options.model} in float32, {options.steps} steps of 4 of {options.rows:,} rows of GSM8K, {options.held_out} "
        f"held out; learning rate {options.learning_rate:g}, for adalora {RUNS['adalora']['learning_rate']:g}, "
        f"for full {RUNS['full']['learning_rate']:g}; "
        f"{os.cpu_count()} cores of {processor()}. Command: `python benches/tuners.py --steps {options.steps}`",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
