"""Training beside TRL's SFTTrainer: trained tokens a second, peak memory, and what was learnt.

    make bench-train                       # makes a venv of its own for TRL, then runs this
    python benches/train.py --trl .venv-trl/bin/python [--steps 40] [--dtype bfloat16]

Both tune a LoRA on the same model, rows, seed, rate and number of rows a step; the held-out loss is computed by the
same plain loop of Transformers. Each contender runs in a process of its own, one after the other; its first steps are
not timed. On a GPU the same script runs with flash attention where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 4
CONTENDERS = {
    "trl": ("TRL, its defaults", {}),
    "trl-packed": ("TRL, packing", {"packing": True}),
    "trl-padding-free": ("TRL, padding-free", {"padding_free": True, "max_length": None}),
    "trl-grouped": (
        "TRL, rows of like length together",
        {"train_sampling_strategy": "group_by_length"},
    ),
    "sftcore": ("sftcore, its defaults", {}),
    "sftcore-packed": ("sftcore, packing", {"packing": True}),
    "sftcore-padding-free": ("sftcore, padding-free", {"padding_free": True}),
    "sftcore-no-checkpointing": (
        "sftcore, no gradient checkpointing",
        {"gradient_checkpointing": False},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--trl", help="the Python of a venv with trl; leave out to measure sftcore alone"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shared", default=os.environ.get("SFTCORE_SHARED", "../shared/data"))
    parser.add_argument("--rows", default="datasets/llamafactory/alpaca_en_demo.json")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--work", default="target/bench-train")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = Path(options.work).resolve()
    if options.contender:
        settings = json.loads((work / "settings.json").read_text())
        run = run_trl if options.contender.startswith("trl") else run_sftcore
        found = run(settings, CONTENDERS[options.contender][1], work)
        (work / f"{options.contender}.json").write_text(json.dumps(found))
        return 0
    prepare(options, work)
    figures = {}
    for name in options.contenders:
        if name.startswith("trl") and not options.trl:
            continue
        python = options.trl if name.startswith("trl") else sys.executable
        command = [python, __file__, "--contender", name, "--work", str(work)]
        log = work / f"{name}.log"
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
        if code:
            print(f"{CONTENDERS[name][0]} failed: {log.read_text().strip().splitlines()[-1]}")
            continue
        figures[name] = json.loads((work / f"{name}.json").read_text())
        show_one(name, figures[name])
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))
    return compare(figures)


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Writes the rows of both forms, held-out tokens, and the settings."""
    import torch

    from sftcore.data import Encoder
    from sftcore.models import resolve_model

    work.mkdir(parents=True, exist_ok=True)
    folder = resolve_model(options.model)
    encoder = Encoder.from_pretrained(folder, max_length=options.max_length)
    rows = json.loads((Path(options.shared) / options.rows).read_text(encoding="utf-8"))
    chats = []
    for row in rows:
        question = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
        answer = {"role": "assistant", "content": row["output"]}
        chat = [{"role": "user", "content": question}, answer]
        # TRL cuts longer rows and sftcore leaves them out, so that neither is given any
        if row["output"].strip() and fits(encoder, chat, options.max_length):
            chats.append(chat)
    held_out, train = chats[:48], chats[48:]
    with (work / "messages.jsonl").open("w", encoding="utf-8") as ours:
        ours.writelines(json.dumps({"messages": chat}) + "\n" for chat in train)
    with (work / "prompts.jsonl").open("w", encoding="utf-8") as theirs:
        theirs.writelines(
            json.dumps({"prompt": chat[:1], "completion": chat[1:]}) + "\n" for chat in train
        )
    examples = [encoder.encode({"messages": chat}) for chat in held_out]
    (work / "held_out.json").write_text(
        json.dumps([[e.input_ids.tolist(), e.labels.tolist()] for e in examples])
    )
    has_bf16 = torch.cuda.is_available() or "amx_bf16" in cpu_flags()
    settings = {
        "model": str(folder),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "learning_rate": options.learning_rate,
        "dtype": options.dtype or ("bfloat16" if has_bf16 else "float32"),
    }
    (work / "settings.json").write_text(json.dumps(settings))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    print(
        f"{device}, {os.cpu_count()} cores; {options.model}, LoRA, {settings['dtype']}, {len(train)} rows of "
        f"{Path(options.rows).name}, batch {options.batch_size} x {options.max_length}, {options.steps} steps"
    )


def fits(encoder: Any, chat: list[dict[str, str]], max_length: int) -> bool:
    from sftcore.errors import RowError

    try:
        return len(encoder.encode({"messages": chat}).input_ids) <= max_length
    except RowError:
        return False


def run_sftcore(settings: dict[str, Any], extra: dict[str, Any], work: Path) -> dict[str, Any]:
    from transformers import TrainerCallback

    from sftcore.config import TrainConfig
    from sftcore.train import train
    from sftcore.train import trainer as module

    clock = Clock()

    class Timed(module.SftTrainer):
        """Counts what goes through a step."""

        def __init__(self, **arguments: Any) -> None:
            arguments["callbacks"].append(callback_of(clock, TrainerCallback))
            super().__init__(**arguments)

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            clock.count(inputs)
            return super().training_step(model, inputs, *rest)

    module.SftTrainer = Timed
    config = TrainConfig(
        model=settings["model"],
        dataset=[str(work / "messages.jsonl")],
        max_length=settings["max_length"],
        torch_dtype=settings["dtype"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=1,
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        lora_dropout=0.0,
        split_dataset_ratio=0.0,
        save_steps=settings["steps"],
        logging_steps=10,
        output_dir=str(work / "sftcore"),
        disable_tqdm=True,
        **extra,
    )
    result = train(config)
    peak = peak_bytes()
    loss = held_out_loss(settings["model"], result["last_model_checkpoint"], work)
    return clock.figures() | {"peak_bytes": peak} | loss


def run_trl(settings: dict[str, Any], extra: dict[str, Any], work: Path) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = Clock()

    class Timed(SFTTrainer):
        """Counts what goes through a step."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            clock.count(inputs)
            return super().training_step(model, inputs, *rest)

    on_gpu = torch.cuda.is_available()
    output = work / "trl"
    arguments: dict[str, Any] = {
        "output_dir": str(output),
        "max_length": settings["max_length"],
        "per_device_train_batch_size": settings["batch_size"],
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "bf16": on_gpu and settings["dtype"] == "bfloat16",
        "use_cpu": not on_gpu,
        # what sftcore does too: the same rate, decay and clipping, so that what is learnt can be compared
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": settings["dtype"]},
    }
    trainer = Timed(
        model=settings["model"],
        args=SFTConfig(**(arguments | extra)),
        train_dataset=load_dataset(
            "json", data_files=str(work / "prompts.jsonl"), split="train", cache_dir=work / "cache"
        ),
        peft_config=LoraConfig(
            r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[callback_of(clock, TrainerCallback)],
    )
    trainer.train()
    peak = peak_bytes()
    trainer.save_model(str(output / "adapter"))
    loss = held_out_loss(settings["model"], str(output / "adapter"), work)
    return clock.figures() | {"peak_bytes": peak} | loss


class Clock:
    """Seconds, tokens and trained tokens of the steps that are timed."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, int, int, int]] = []
        self.started = 0.0
        self.ended = 0.0
        self.waited = 0.0
        self.counts = (0, 0, 0)

    def count(self, inputs: dict[str, Any]) -> None:
        """Counts a batch: all its places, those that hold tokens, and those that are trained."""
        labels = inputs["labels"]
        places = labels.numel()
        tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else places
        if "cu_seqlens" in inputs and len(labels) > 1:
            tokens = places - padding_of(inputs)
        self.counts = (places, tokens, int((labels[:, 1:] != -100).sum()))
        self.waited = time.perf_counter() - max(self.started, self.ended)

    def step(self) -> None:
        """Ends a step."""
        now = time.perf_counter()
        if self.started:
            self.steps.append((now - (self.ended or self.started), self.waited, *self.counts))
        self.ended = now

    def figures(self) -> dict[str, Any]:
        """Returns the sums over the steps that are timed."""
        seconds, waited, places, tokens, trained = (
            sum(step[n] for step in self.steps[WARM_UP:]) for n in range(5)
        )
        return {
            "seconds": seconds,
            "waited": waited,
            "steps": len(self.steps) - WARM_UP,
            "places": places,
            "tokens": tokens,
            "trained_tokens": trained,
        }


def padding_of(inputs: dict[str, Any]) -> int:
    """Returns the places of packed rows that hold no token: parts of the borders beyond the examples."""
    lengths = (inputs["cu_seqlens"][1:] - inputs["cu_seqlens"][:-1]).tolist()
    surplus = len(lengths) - len(inputs["rows"])
    ends = inputs["cu_seqlens"][1:].tolist()
    width = inputs["labels"].shape[1]
    flat = inputs["labels"].reshape(-1)
    padding = 0
    for length, end in zip(lengths, ends, strict=True):
        if surplus and end % width == 0 and bool((flat[end - length : end] == -100).all()):
            padding += length
            surplus -= 1
    return padding


def callback_of(clock: Clock, base: Any) -> Any:
    class Watch(base):  # type: ignore[misc]
        """Tells the clock when steps begin and end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    return Watch()


def held_out_loss(model: str, adapter: str, work: Path) -> dict[str, float]:
    """Returns the mean loss of the held-out tokens for the base model and the tuned one, row by row in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    tuned = PeftModel.from_pretrained(net, adapter).eval()
    rows = json.loads((work / "held_out.json").read_text())

    def mean() -> float:
        total, count = 0.0, 0
        for ids, labels in rows:
            with torch.no_grad():
                logits = tuned(torch.tensor([ids], device=device)).logits[0, :-1].float()
            wanted = torch.tensor(labels[1:], device=device)
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            count += int((wanted != -100).sum())
        return total / count

    with tuned.disable_adapter():
        before = mean()
    return {"loss_before": before, "loss_after": mean()}


def peak_bytes() -> int:
    """Returns the peak memory so far: of the GPU where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show_one(name: str, found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    parts = [
        f"{CONTENDERS[name][0]:<36}",
        f"{found['trained_tokens'] / seconds:8.1f} trained tokens/s",
        f"{found['tokens'] / seconds:8.1f} tokens/s",
        f"{1 - found['tokens'] / found['places']:6.1%} padding",
        f"{found['waited'] / seconds:6.2%} waiting for data",
        f"{found['peak_bytes'] / 1e9:5.2f} GB",
        f"held-out loss {found['loss_before']:.4f} -> {found['loss_after']:.4f}",
    ]
    print("  ".join(parts), flush=True)


def compare(figures: dict[str, dict[str, Any]]) -> int:
    """Prints the ratios that are asked for; 1 where something was not learnt."""

    def rate(name: str) -> float:
        return float(figures[name]["trained_tokens"] / figures[name]["seconds"])

    theirs = [name for name in figures if name.startswith("trl")]
    ours = [name for name in figures if name.startswith("sftcore")]
    for name in figures:
        if figures[name]["loss_after"] >= figures[name]["loss_before"]:
            print(f"{CONTENDERS[name][0]}: the held-out loss did not fall")
            return 1
    if "trl" in figures and "sftcore" in figures:
        speed = rate("sftcore") / rate("trl")
        memory = figures["sftcore"]["peak_bytes"] / figures["trl"]["peak_bytes"]
        print(f"defaults beside defaults: {speed:.2f} x trained tokens/s (goal 1.5), ", end="")
        print(f"{memory:.2f} x peak memory (goal 0.7)")
    if theirs and ours:
        best, mine = max(theirs, key=rate), max(ours, key=rate)
        print(
            f"best beside best: {rate(mine) / rate(best):.2f} x trained tokens/s "
            f"({CONTENDERS[mine][0]} beside {CONTENDERS[best][0]}; goal 1)"
        )
        least, small = (
            min(names, key=lambda name: float(figures[name]["peak_bytes"]))
            for names in (theirs, ours)
        )
        print(
            f"least memory beside least: {figures[small]['peak_bytes'] / figures[least]['peak_bytes']:.2f} x "
            f"({CONTENDERS[small][0]} beside {CONTENDERS[least][0]})"
        )
    return 0


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.is_file() else set()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    raise SystemExit(main())
