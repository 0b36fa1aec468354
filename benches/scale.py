"""What the data engine costs on 1 GB and 10 GB: seconds to the first batch, rates, memory, resume, padding.

Real rows are mixed into a file of each size. Each measurement is a process of its own on two cores, without torch, so
that its peak of memory is its own; the file may be in the page cache. What is timed is checked first: no row is lost,
and each comes once an epoch. Each figure stands beside its goal. The index is made anew for `bucket` and for `pack`;
the rates of an epoch are those of its first seconds.

  python benches/scale.py                          1 GB, about eight minutes with the corpus
  python benches/scale.py --size 1G --size 10G     both, about half an hour and 12 GB of disk
  python benches/scale.py --size 50M --no_plan     a quick look
  python benches/scale.py --folder /data/scale     keeps the corpora there for the next time
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scale_corpus import SHARED, Corpus, write_corpus

from sftcore.data import BatchLoader, Encoder, StreamLoader

Mode = Literal["bucket", "pack"]
TOKENIZER = SHARED / "tokenizers" / "smollm2"
MAX_LENGTH = 2048
BATCH_SIZES = {"bucket": 8, "pack": 1}
CHECKED_BYTES = 20_000_000
CORES = 2
# of so many batches the bytes of each row are looked up
LOOKED_UP = 250

# the goals
MB_PER_SECOND_AND_CORE = 60.0
PEAK_BYTES, PEAK_BYTES_PER_ROW = 400e6, 24
RESUME_SECONDS = STREAM_SECONDS = 1.0
PADDING_PERCENT = {"bucket": 2.0, "pack": 1.0}
PLAN_SECONDS = 5.0
GROWTH = 1.25  # what ten times the rows may cost, a row; timings are not finer


# What is measured, each in a process of its own.


def open_encoder() -> Encoder:
    return Encoder.from_pretrained(TOKENIZER, max_length=MAX_LENGTH)


def open_loader(
    path: Path, mode: Mode, *, origin: str = "built", cache: bool = True, encoder: Encoder
) -> BatchLoader:
    """A loader; its index must be newly made, or found."""
    shown = time.monotonic()

    def show(done: int, all_bytes: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"    {done / all_bytes:.0%} of {path.name}", file=sys.stderr)

    loader = BatchLoader(
        path,
        encoder,
        mode=mode,
        batch_size=BATCH_SIZES[mode],
        cache=cache,
        return_tensors="np",
        return_rows=True,
        progress=show,
    )
    assert loader.report["origin"] == origin, loader.report["origin"]
    return loader


def tokens_of(batch: dict[str, Any], pad_token_id: int) -> int:
    """The tokens of a batch that are in examples."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    # padding counts as an example; no other begins with the padding id
    borders = batch["cu_seqlens"]
    is_example = batch["input_ids"].ravel()[borders[:-1]] != pad_token_id
    assert int(is_example.sum()) == len(batch["rows"])
    return int(np.diff(borders)[is_example].sum())


def measure_check(path: Path, *, rows: int) -> dict[str, Any]:
    """Every row comes once an epoch, of a stream too."""
    encoder = open_encoder()
    for mode in BATCH_SIZES:
        loader = open_loader(path, mode, cache=False, encoder=encoder)
        seen = sorted(row for batch in loader for row in batch["rows"].tolist())
        assert seen == list(range(loader.num_rows)), mode
        assert loader.num_rows + loader.report["deleted"] == loader.report["rows"] == rows
    stream = StreamLoader(path, encoder, batch_size=8, return_tensors="np", return_rows=True)
    assert sorted(row for batch in stream for row in batch["rows"].tolist()) == seen
    return {"examples": len(seen)}


def measure_epoch(path: Path, mode: Mode, *, seconds: float) -> dict[str, Any]:
    """A start without a memo, and some seconds of an epoch."""
    started = time.perf_counter()
    encoder = open_encoder()
    encoder_seconds = time.perf_counter() - started
    cpu_started = time.process_time()
    loader = open_loader(path, mode, encoder=encoder)
    index_seconds = time.perf_counter() - started - encoder_seconds
    index_cpu_seconds = time.process_time() - cpu_started
    batches = iter(loader)
    next(batches)
    first_batch_seconds = time.perf_counter() - started

    tokens = places = examples = looked_up = 0
    rows: list[int] = []
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        tokens += tokens_of(batch, encoder.pad_token_id)
        num_rows, width = batch["input_ids"].shape
        places += num_rows * (MAX_LENGTH if mode == "pack" else width)
        examples += len(batch["rows"])
        if number < LOOKED_UP:
            rows.extend(batch["rows"].tolist())
            looked_up = tokens
        elif time.perf_counter() - started > seconds:
            break
    epoch_seconds = time.perf_counter() - started
    peak = peak_memory()
    bytes_per_token = sum(len(loader.row(row)[0]) + 1 for row in rows) / looked_up
    report = loader.report
    steps = loader.steps_per_epoch
    return {
        "encoder_seconds": encoder_seconds,
        "index_seconds": index_seconds,
        "index_cpu_seconds": index_cpu_seconds,
        "first_batch_seconds": first_batch_seconds,
        "epoch_mb_per_second": tokens * bytes_per_token / epoch_seconds / 1e6,
        "epoch_tokens_per_second": tokens / epoch_seconds,
        "epoch_seconds": epoch_seconds,
        "epoch_examples": examples,
        "padding_percent": 100 * (1 - tokens / places),
        "state": {**loader.state_dict(), "step": steps * 9 // 10},
        **{name: report[name] for name in ("rows", "examples", "deleted", "tokens")},
        **peak,
    }


def measure_start(path: Path, mode: Mode) -> dict[str, Any]:
    """A start with a memo."""
    started = time.perf_counter()
    batches = iter(open_loader(path, mode, origin="memo", encoder=open_encoder()))
    next(batches)
    return {"first_batch_seconds": time.perf_counter() - started, **peak_memory()}


def measure_resume(path: Path, mode: Mode, *, state: dict[str, Any]) -> dict[str, Any]:
    """A start with a memo that goes on from a state."""
    started = time.perf_counter()
    loader = open_loader(path, mode, origin="memo", encoder=open_encoder())
    opened = time.perf_counter()
    loader.load_state_dict(state)
    batch = next(iter(loader))
    ended = time.perf_counter()
    planned = loader.global_batch(state["epoch"], state["step"])
    assert batch["rows"].tolist() == [row for pack in planned for row in pack]
    return {"seconds": ended - started, "state_seconds": ended - opened, **peak_memory()}


def measure_stream(path: Path) -> dict[str, Any]:
    """A stream to its first batch."""
    started = time.perf_counter()
    encoder = open_encoder()
    opened = time.perf_counter()
    next(iter(StreamLoader(path, encoder, batch_size=8, return_tensors="np")))
    ended = time.perf_counter()
    return {"seconds": ended - started, "encoder_seconds": opened - started, **peak_memory()}


def measure_index(path: Path) -> dict[str, Any]:
    """An index without a memo, and the plans of an epoch."""
    encoder = open_encoder()
    started = time.perf_counter()
    loader = open_loader(path, "bucket", cache=False, encoder=encoder)
    index_seconds = time.perf_counter() - started
    plan_seconds = {}
    for mode, batch_size in BATCH_SIZES.items():
        started = time.perf_counter()
        steps = loader.sibling(split="all", batch_size=batch_size, mode=mode).steps_per_epoch
        plan_seconds[mode] = time.perf_counter() - started
        assert steps > 0
    return {
        "index_seconds": index_seconds,
        "plan_seconds": plan_seconds,
        "rows": loader.report["rows"],
        "examples": loader.num_rows,
    }


def measure_corpus(path: Path, *, size: int) -> dict[str, Any]:
    """Writes rows, in a process of its own so that the pieces they are made of stay there."""
    started = time.perf_counter()
    corpus = write_corpus(path, size)
    return {"rows": corpus.rows, "size": corpus.size, "seconds": time.perf_counter() - started}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    name.removeprefix("measure_"): measure
    for name, measure in list(globals().items())
    if name.startswith("measure_")
}


def peak_memory() -> dict[str, float]:
    """The most bytes of this process that were in memory at a time.

    `VmHWM` begins with this program; `ru_maxrss` also counts what its parent held as it started this.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    high = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert high
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"peak_bytes": int(high[1]) * 1024, "maxrss_bytes": used.ru_maxrss * 1024}


def run_child(name: str, cores: int, arguments: dict[str, Any]) -> None:
    """Measures and prints what came of it as JSON."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    path = Path(arguments.pop("path"))
    found = MEASURES[name](path, **arguments)
    assert "torch" not in sys.modules
    print(json.dumps(found))


def measure(
    name: str, path: Path, *, cache: Path, cores: int = CORES, **arguments: Any
) -> dict[str, Any]:
    """What `measure_NAME` found in a process of its own."""
    mode = arguments.get("mode", "")
    print(f"  {path.name}: {name} {mode}".rstrip(), file=sys.stderr)
    text = json.dumps({"path": str(path), **arguments})
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, "--cores", str(cores), "--arguments", text],
        env={**os.environ, "SFTCORE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        # it has said why
        raise SystemExit(f"{path}: the measurement {name} {mode}".rstrip() + " failed")
    return json.loads(done.stdout)


# What is shown.


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure beside its goal.

    Attributes:
        name: What it is of.
        value: It.
        unit: Of both.
        goal: The most it may be, or the least; None where it is told for its own sake.
        is_least: Which of the two.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    is_least: bool = False

    @property
    def verdict(self) -> str:
        """`reached`, `missed`, or nothing."""
        if self.goal is None:
            return ""
        is_reached = self.value >= self.goal if self.is_least else self.value <= self.goal
        return "reached" if is_reached else "missed"

    def show(self) -> None:
        """Prints a line."""
        goal = ""
        if self.goal is not None:
            goal = f"{'>=' if self.is_least else '<='} {self.goal:,.4g} {self.unit}"
        text = f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:.3g}"
        print(f"{self.name:<46}{text:>12} {self.unit:<12}{goal:>20}  {self.verdict}", flush=True)


def measure_size(corpus: Corpus, work: Path, seconds: float, *, is_smallest: bool) -> list[Figure]:
    """All figures of a corpus; prints them as they come."""
    figures: list[Figure] = []

    def add(name: str, value: float, unit: str, goal: float | None = None, **more: bool) -> None:
        figures.append(Figure(name=name, value=value, unit=unit, goal=goal, **more))
        figures[-1].show()

    megabytes = corpus.size / 1e6
    rate = MB_PER_SECOND_AND_CORE * CORES
    peak_goal = (PEAK_BYTES + PEAK_BYTES_PER_ROW * corpus.rows) / 1e6
    for mode in BATCH_SIZES:
        cache = work / f"{corpus.path.stem}-{mode}"
        found = measure("epoch", corpus.path, cache=cache, mode=mode, seconds=seconds)
        assert found["rows"] == corpus.rows
        if mode == "bucket":
            add("examples", found["examples"], "")
            add(f"rows over {MAX_LENGTH:,} tokens, left out", found["deleted"], "")
            add("tokens of an example, mean", found["tokens"] / found["examples"], "")
            add("open the tokenizer", found["encoder_seconds"], "s")
        index = found["index_seconds"]
        add(f"{mode}: index", index, "s")
        add(f"{mode}: index, {CORES} cores", megabytes / index, "MB/s", rate, is_least=True)
        # where others use the cores too, this tells what the work itself costs
        add(f"{mode}: index, a CPU second", megabytes / found["index_cpu_seconds"], "MB")
        first = found["first_batch_seconds"]
        add(f"{mode}: first batch, no memo", first, "s", megabytes / rate)
        add(f"{mode}: epoch, bytes of rows", found["epoch_mb_per_second"], "MB/s")
        add(f"{mode}: epoch, tokens", found["epoch_tokens_per_second"] / 1e6, "M tokens/s")
        add(f"{mode}: padding", found["padding_percent"], "%", PADDING_PERCENT[mode])
        add(f"{mode}: peak memory, index and epoch", found["peak_bytes"] / 1e6, "MB", peak_goal)
        start = measure("start", corpus.path, cache=cache, mode=mode)
        add(f"{mode}: first batch, memo", start["first_batch_seconds"], "s")
        resume = measure("resume", corpus.path, cache=cache, mode=mode, state=found["state"])
        add(f"{mode}: resume at 90 %, in all", resume["seconds"], "s", RESUME_SECONDS)
        add(f"{mode}: resume at 90 %, state to batch", resume["state_seconds"], "s")
    stream = measure("stream", corpus.path, cache=work)
    add("stream: first batch", stream["seconds"], "s", STREAM_SECONDS)
    add("stream: peak memory", stream["peak_bytes"] / 1e6, "MB", PEAK_BYTES / 1e6)
    if is_smallest:
        found = measure("index", corpus.path, cache=work, cores=1)
        alone = megabytes / found["index_seconds"]
        add("index, 1 core", alone, "MB/s", MB_PER_SECOND_AND_CORE, is_least=True)
    return figures


def measure_growth(corpora: list[Corpus], work: Path) -> list[Figure]:
    """What a row costs in small files and large ones."""
    print("\nnanoseconds a row, by size")
    print(f"{'rows':>12}{'MB':>10}{'index':>12}{'plan bucket':>14}{'plan pack':>12}")
    costs = []
    for corpus in corpora:
        found = measure("index", corpus.path, cache=work)
        assert found["rows"] == corpus.rows
        plans = found["plan_seconds"]
        cost = {
            "index": found["index_seconds"] / corpus.rows * 1e9,
            **{f"plan {mode}": plans[mode] / found["examples"] * 1e9 for mode in plans},
        }
        costs.append(cost)
        print(
            f"{corpus.rows:>12,}{corpus.size / 1e6:>10,.0f}{cost['index']:>12,.0f}"
            f"{cost['plan bucket']:>14,.1f}{cost['plan pack']:>12,.1f}",
            flush=True,
        )
    figures = [
        Figure(
            name=f"a row of 10x beside 1x, {name}",
            value=costs[-1][name] / cost,
            unit="x",
            goal=GROWTH,
        )
        for name, cost in costs[0].items()
    ]
    for figure in figures:
        figure.show()
    return figures


def measure_plan() -> list[Figure]:
    """The plan of 10 million rows, by the bench of the core."""
    print("\nplanning alone: cargo bench -p sftcore --bench plan")
    command = ["cargo", "bench", "--locked", "--quiet", "-p", "sftcore", "--bench", "plan"]
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout.rstrip())
    found = re.findall(r"^(\w+) +10000000 +([\d.]+)", done.stdout, re.MULTILINE)
    assert {name for name, _ in found} >= set(BATCH_SIZES), done.stdout
    figures = [
        Figure(name=f"plan 10 M rows, {name}", value=float(took), unit="s", goal=PLAN_SECONDS)
        for name, took in found
    ]
    for figure in figures:
        figure.show()
    return figures


def machine() -> str:
    """The processor, its cores and the memory."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = min(CORES, len(os.sched_getaffinity(0)))
    name = model[1] if model else platform.processor()
    return f"{name}, {cores} of {os.cpu_count()} cores, {memory:.0f} GiB"


def bytes_of(text: str) -> int:
    """The bytes that `500M` or `1G` stand for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG])", text.upper())
    size = int(float(match[1]) * {"K": 1e3, "M": 1e6, "G": 1e9}[match[2]]) if match else 0
    if size < 1_000_000:
        raise argparse.ArgumentTypeError(
            f'"{text}" is not a size from 1M on; write it like 500M or 10G'
        )
    return size


def name_of(size: int) -> str:
    """How a file of so many bytes is named."""
    return f"corpus-{size / 1e6:g}M.jsonl"


def measure_all(known: argparse.Namespace, folder: Path, work: Path) -> dict[str, Any]:
    """Writes the corpora and measures; returns what `--json` keeps."""
    sizes: list[int] = sorted(set(known.size or [10**9]))

    def corpus_of(size: int) -> Corpus:
        path = folder / name_of(size)
        found = measure("corpus", path, cache=work, size=size)
        return Corpus(path=path, rows=found["rows"], size=found["size"])

    small = corpus_of(CHECKED_BYTES)
    checked = measure("check", small.path, cache=work, rows=small.rows)
    print(f"{machine()}; SmolLM2's tokenizer, max_length {MAX_LENGTH:,}")
    print(f"checked on {small.rows:,} rows: each of {checked['examples']:,} examples comes once")
    results: dict[str, Any] = {"machine": machine(), "sizes": []}
    for size in sizes:
        corpus = corpus_of(size)
        print(f"\n{corpus.size / 1e9:.3g} GB, {corpus.rows:,} rows")
        figures = measure_size(corpus, work, known.seconds, is_smallest=size == sizes[0])
        entry = {"bytes": corpus.size, "rows": corpus.rows, "figures": as_json(figures)}
        results["sizes"].append(entry)
    parts = [corpus_of(int(sizes[0] * share)) for share in (0.1, 0.4, 1)]
    results["growth"] = as_json(measure_growth(parts, work))
    if not known.no_plan:
        results["plan"] = as_json(measure_plan())
    return results


def as_json(figures: list[Figure]) -> list[dict[str, Any]]:
    """Figures and verdicts as JSON holds them."""
    return [{**asdict(figure), "verdict": figure.verdict} for figure in figures]


def main() -> None:
    """Reads the command line; measures, or is one of the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=bytes_of, action="append", help="like 500M or 10G; may be given again (1G)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where corpora are made and kept; else a temporary folder"
    )
    parser.add_argument(
        "--seconds", type=float, default=20, help="how long the epoch is watched (20)"
    )
    parser.add_argument("--no_plan", action="store_true", help="without the bench of the core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the figures here")
    parser.add_argument("--child", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=CORES, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.child:
        run_child(known.child, known.cores, known.arguments)
        return
    if not SHARED.is_dir():
        raise SystemExit(f"needs the shared data folder ({SHARED}); set SFTCORE_SHARED to it")
    if not known.no_plan and not shutil.which("cargo"):
        raise SystemExit(
            "cargo is not there to plan 10 million rows; install Rust or pass --no_plan"
        )
    if known.folder:
        known.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=known.folder, prefix="scale-") as temporary:
        work = Path(temporary)
        results = measure_all(known, known.folder or work, work)
    if known.json:
        known.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
