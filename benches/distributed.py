"""One process, two under DDP and two under ZeRO-2: tokens a second, beside the plain Trainer with the same settings.

    make bench-distributed
    python benches/distributed.py [--steps 16] [--processes 2]

Every contender tunes the same LoRA on the same rows with as many examples a step; the plain Trainer of Transformers
runs under accelerate, started by torchrun, with rows that are encoded beforehand. The losses of sftcore must be equal
on one process and on two before anything is compared. On a GPU machine the same script runs with one GPU a process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import processor

from sftcore.program import run_program

MAX_LENGTH = 512
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sftcore-1": ("sftcore, one process", {}),
    "sftcore-ddp": ("sftcore, DDP", {}),
    "sftcore-zero2": ("sftcore, ZeRO-2", {"deepspeed": "zero2"}),
    "trainer-1": ("Trainer, one process", {}),
    "trainer-ddp": ("Trainer under accelerate, DDP", {}),
    "trainer-zero2": ("Trainer under accelerate, ZeRO-2", {"deepspeed": True}),
}
ZERO_2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shared", default=os.environ.get("SFTCORE_SHARED", "../shared/data"))
    parser.add_argument("--rows", default="datasets/gsm8k/train.jsonl")
    parser.add_argument("--steps", type=int, default=16, help="the second half is timed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--examples", type=int, default=4, help="of an optimizer step")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--work", default="target/bench-distributed")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = Path(options.work).resolve()
    if options.contender:
        return contend(options, work)
    work.mkdir(parents=True, exist_ok=True)
    write_rows(options, work / "rows.jsonl")
    print(
        f"{processor()}, {os.cpu_count()} cores; {options.model}, LoRA, {options.examples} examples of "
        f"{Path(options.rows).parent.name} a step, {options.steps} steps, the second half timed"
    )
    figures = {}
    for name in options.contenders:
        if name.endswith("zero2") and importlib.util.find_spec("deepspeed") is None:
            print(f"{CONTENDERS[name][0]}: left out, as deepspeed is not installed")
            continue
        found = run(name, options, work)
        if found is None:
            return 1
        figures[name] = found
        print(
            f"{CONTENDERS[name][0]:<34}{found['tokens_per_second']:8.1f} tokens/s  "
            f"{found['trained_tokens_per_second']:7.1f} trained  {found['memory_gib']:5.2f} GiB a process  "
            f"loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}",
            flush=True,
        )
    return compare(figures)


def write_rows(options: argparse.Namespace, path: Path) -> None:
    """Writes the first rows that no contender has to cut or to leave out."""
    from sftcore.data import Encoder
    from sftcore.models import resolve_model

    encoder = Encoder.from_pretrained(resolve_model(options.model))
    rows = (Path(options.shared) / options.rows).read_text(encoding="utf-8").splitlines()
    short = [row for row in rows[:600] if len(encoder.encode(row).input_ids) <= MAX_LENGTH]
    path.write_text("\n".join(short[:512]), encoding="utf-8")


def run(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any] | None:
    """Runs one contender in processes of its own; None where it failed."""
    count = 1 if name.endswith("-1") else options.processes
    words = [__file__, "--contender", name]
    for flag in ("model", "steps", "processes", "examples", "work"):
        words += [f"--{flag}", str(getattr(options, flag))]
    command = [sys.executable, *words]
    threads = max(1, (os.cpu_count() or 1) // count)
    if count > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(count), *words]
    log = work / f"{name}.log"
    with log.open("w") as file:
        code = subprocess.run(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        ).returncode
    if code:
        print(f"{CONTENDERS[name][0]} failed:\n{log.read_text()[-3000:]}")
        return None
    found: dict[str, Any] = json.loads((work / f"{name}.json").read_text())
    return found


def contend(options: argparse.Namespace, work: Path) -> int:
    runs = run_sftcore if options.contender.startswith("sftcore") else run_trainer
    found = runs(options, CONTENDERS[options.contender][1], work)
    if os.environ.get("RANK", "0") == "0":
        (work / f"{options.contender}.json").write_text(json.dumps(found))
    return 0


def run_sftcore(
    options: argparse.Namespace, settings: dict[str, Any], work: Path
) -> dict[str, Any]:
    from sftcore.config import TrainConfig
    from sftcore.train import train

    count = int(os.environ.get("WORLD_SIZE", "1"))
    result = train(
        TrainConfig(
            model=options.model,
            dataset=[str(work / "rows.jsonl")],
            output_dir=str(work / options.contender),
            split_dataset_ratio=0.0,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=options.examples // count,
            gradient_accumulation_steps=1,
            max_steps=options.steps,
            logging_steps=options.steps // 2,
            logging_first_step=True,
            save_strategy="no",
            learning_rate=2e-4,
            lora_dropout=0.0,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to=["none"],
            **settings,
        )
    )
    logs = [entry for entry in result["log_history"] if "loss" in entry]
    last = logs[-1]
    return {
        "losses": [entry["loss"] for entry in logs],
        "tokens_per_second": last["tokens_per_second"],
        "trained_tokens_per_second": last["trained_tokens_per_second"],
        "memory_gib": result["speed"]["memory_gib"],
    }


def run_trainer(
    options: argparse.Namespace, settings: dict[str, Any], work: Path
) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from sftcore.data import Encoder
    from sftcore.models import resolve_model
    from sftcore.train.speed import peak_memory

    count = int(os.environ.get("WORLD_SIZE", "1"))
    folder = resolve_model(options.model)
    encoder = Encoder.from_pretrained(folder, max_length=MAX_LENGTH)
    lines = (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [encoder.encode(line) for line in lines]
    counts = {"tokens": 0, "trained": 0}

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(row.input_ids) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for place, row in enumerate(batch):
            ids[place, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
            labels[place, : len(row.input_ids)] = torch.from_numpy(row.labels)
            counts["tokens"] += len(row.input_ids)
            counts["trained"] += int((row.labels[1:] != -100).sum())
        mask = torch.tensor(
            [[1] * len(r.input_ids) + [0] * (width - len(r.input_ids)) for r in batch]
        )
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    class Watch(TrainerCallback):
        """Notes the time and the tokens at the half of the run and at its end."""

        marks: dict[int, tuple[float, int, int]] = {}  # noqa: RUF012

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            mark = (time.perf_counter(), counts["tokens"], counts["trained"])
            self.marks[state.global_step] = mark

    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments: dict[str, Any] = {"deepspeed": ZERO_2} if settings.get("deepspeed") else {}
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=str(work / options.contender),
            per_device_train_batch_size=options.examples // count,
            max_steps=options.steps,
            logging_steps=options.steps // 2,
            logging_first_step=True,
            save_strategy="no",
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            **arguments,
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Watch()],
    )
    trainer.train()
    half, end = Watch.marks[options.steps // 2], Watch.marks[options.steps]
    sums = torch.tensor([end[1] - half[1], end[2] - half[2]], device=trainer.args.device)
    if count > 1:
        dist.all_reduce(sums)
    seconds = end[0] - half[0]
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    peak = peak_memory() / 2**30
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {
        "losses": losses,
        "tokens_per_second": float(sums[0]) / seconds,
        "trained_tokens_per_second": float(sums[1]) / seconds,
        "memory_gib": peak,
    }


def compare(figures: dict[str, dict[str, Any]]) -> int:
    """Holds the losses to each other, then prints the ratios."""
    alone = figures.get("sftcore-1")
    for name in ("sftcore-ddp", "sftcore-zero2"):
        if alone and name in figures:
            pairs = zip(alone["losses"], figures[name]["losses"], strict=True)
            apart = max(abs(one - other) for one, other in pairs)
            if apart > 1e-3:
                print(f"{CONTENDERS[name][0]}: losses differ from one process by {apart:.2g}")
                return 1
    for name, found in figures.items():
        # so few steps are no training, but none of them may leave the neighbourhood of the others
        if abs(found["losses"][-1] - next(iter(figures.values()))["losses"][-1]) > 0.3:
            print(f"{CONTENDERS[name][0]}: the last loss is {found['losses'][-1]:.4f}")
            return 1

    def ratio(one: str, other: str) -> None:
        if one in figures and other in figures:
            speed = figures[one]["tokens_per_second"] / figures[other]["tokens_per_second"]
            print(f"{CONTENDERS[one][0]} beside {CONTENDERS[other][0]}: {speed:.2f} x tokens/s")

    ratio("sftcore-ddp", "sftcore-1")
    ratio("sftcore-zero2", "sftcore-1")
    ratio("sftcore-1", "trainer-1")
    ratio("sftcore-ddp", "trainer-ddp")
    ratio("sftcore-zero2", "trainer-zero2")
    return 0


if __name__ == "__main__":
    run_program(main)
