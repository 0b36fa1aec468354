"""What the data engine costs on 1 GB and 10 GB: time to the first batch, rates, memory, resume, padding.

  python benches/scale.py                        1 GB, about five minutes with the corpus
  python benches/scale.py --size 1G 10G          both, about twenty minutes and 12 GB of disk
  python benches/scale.py --size 100M --no_plan  a quick look

Each measurement is a process of its own on two cores, without torch, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS = 20.0
MAX_LENGTH = 2048


def peak_mb() -> float:
    """The peak of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def open_loader(path: Path, folder: Path, cores: int, **settings: Any) -> tuple[Any, float]:
    """A loader and the seconds it took, tokenizer included."""
    from sftcore.data import BatchLoader, Encoder

    started = time.perf_counter()
    encoder = Encoder.from_pretrained(folder, max_length=MAX_LENGTH)
    loader = BatchLoader(path, encoder, num_threads=cores, return_tensors="np", **settings)
    return loader, time.perf_counter() - started


def epoch_rate(loader: Any, path: Path, *, is_pack: bool) -> dict[str, float]:
    """Rates and padding of the batches of some seconds; the share of tokens stands for the share of bytes."""
    tokens = places = 0
    started = time.perf_counter()
    for batch in loader:
        if is_pack:
            # what is behind the last example of a pack is padding, as are the places that it does not fill
            tokens += int((batch["input_ids"].size) - _padding(batch))
            places += MAX_LENGTH * len(batch["input_ids"])
        else:
            tokens += int(batch["attention_mask"].sum())
            places += batch["attention_mask"].size
        if time.perf_counter() - started > SECONDS:
            break
    seconds = time.perf_counter() - started
    share = tokens / loader.report["split_tokens"]
    return {
        "mb_per_second": path.stat().st_size * share / seconds / 1e6,
        "tokens_per_second": tokens / seconds,
        "padding": 1 - tokens / places,
    }


def _padding(batch: dict[str, Any]) -> int:
    borders, rows = batch["cu_seqlens"], len(batch["input_ids"])
    examples = len(batch["rows"])
    return int(borders[-1] - borders[examples]) if rows == 1 else 0


def child(name: str, path: Path, folder: Path, cores: int) -> dict[str, Any]:
    """One measurement."""
    is_pack = name.endswith("pack")
    settings: dict[str, Any] = {"mode": "pack", "batch_size": 1} if is_pack else {"batch_size": 8}
    if name.startswith("stream"):
        from sftcore.data import Encoder, StreamLoader

        started = time.perf_counter()
        encoder = Encoder.from_pretrained(folder, max_length=MAX_LENGTH)
        opened = time.perf_counter() - started
        loader = StreamLoader(path, encoder, num_threads=cores, batch_size=8, return_tensors="np")
        next(iter(loader))
        return {"first_batch": time.perf_counter() - started, "tokenizer": opened}
    if name.startswith("resume"):
        loader, opened = open_loader(path, folder, cores, **settings)
        assert loader.report["origin"] == "memo"
        state = {**loader.state_dict(), "step": loader.steps_per_epoch * 9 // 10}
        started = time.perf_counter()
        loader.load_state_dict(state)
        next(iter(loader))
        return {"open": opened, "resume": time.perf_counter() - started}
    use_memo = not name.startswith("one_core")
    loader, opened = open_loader(path, folder, cores, cache=use_memo, return_rows=True, **settings)
    first = time.perf_counter()
    next(iter(loader))
    result = {
        "index": opened,
        "first_batch": opened + time.perf_counter() - first,
        "rows": loader.report["rows"],
        "examples": loader.num_rows,
        "origin": loader.report["origin"],
    }
    if not name.startswith("one_core"):
        loader.set_epoch(0)
        result |= epoch_rate(loader, path, is_pack=is_pack)
    return result


def measure(name: str, path: Path, folder: Path, cache: Path, cores: int = 2) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    print(f"  {path.name}: {name} …", file=sys.stderr)
    environment = {**os.environ, "SFTCORE_CACHE": str(cache)}
    command = [sys.executable, __file__, "--child", name, "--cores", str(cores)]
    done = subprocess.run(
        [*command, "--path", path, "--tokenizer", folder],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def check(folder: Path, work: Path) -> None:
    """Every row comes once, before anything is timed."""
    from scale_corpus import write_corpus

    path = work / "check.jsonl"
    rows = write_corpus(path, 20_000_000)
    for mode in ("bucket", "pack"):
        loader, _ = open_loader(path, folder, 2, mode=mode, return_rows=True, cache=False)
        assert loader.report["rows"] == rows
        seen = [row for batch in loader for row in batch["rows"].tolist()]
        assert sorted(seen) == list(range(loader.num_rows))
        assert loader.num_rows + loader.report["deleted"] == rows


def report(
    path: Path, rows: int, folder: Path, cache: Path
) -> list[tuple[str, str, str, bool | None]]:
    """The figures of one file, each with its goal and whether that is reached."""
    size = path.stat().st_size
    bucket = measure("bucket", path, folder, cache)
    assert bucket["origin"] == "built"
    assert bucket["rows"] == rows
    pack = measure("pack", path, folder, cache)
    resume = {mode: measure(f"resume_{mode}", path, folder, cache) for mode in ("bucket", "pack")}
    stream = measure("stream", path, folder, cache)
    one = measure("one_core", path, folder, cache, cores=1) if size < 4e9 else None
    rate = size / bucket["index"] / 1e6
    memory_goal = 400 + 24 * rows / 1e6
    peak = max(bucket["peak_mb"], pack["peak_mb"])
    lines: list[tuple[str, str, str, bool | None]] = [
        ("index, 2 cores", f"{bucket['index']:.1f} s, {rate:.1f} MB/s", "120 MB/s", rate >= 120),
        ("first batch, no memo", f"{bucket['first_batch']:.1f} s", "the scan", None),
        ("first batch, memo", f"{resume['bucket']['open']:.2f} s", "", None),
    ]
    if one:
        single = size / one["index"] / 1e6
        lines.append(("index, 1 core", f"{single:.1f} MB/s", "60 MB/s", single >= 60))
    for name, found in (("bucket of 8", bucket), ("pack", pack)):
        rates = (
            f"{found['mb_per_second']:.1f} MB/s, {found['tokens_per_second'] / 1e6:.2f} M tokens/s"
        )
        lines.append((f"epoch, {name}", rates, "", None))
        limit = 0.02 if name != "pack" else 0.01
        share = found["padding"]
        lines.append((f"padding, {name}", f"{share:.2%}", f"{limit:.0%}", share < limit))
    lines.append(
        ("peak RSS, index and epoch", f"{peak:.0f} MB", f"{memory_goal:.0f} MB", peak < memory_goal)
    )
    for mode, found in resume.items():
        text = (
            f"{found['resume'] * 1e3:.0f} ms, {found['open'] + found['resume']:.2f} s with opening"
        )
        lines.append((f"resume at 90 %, {mode}", text, "1 s", found["open"] + found["resume"] < 1))
    text = f"{stream['first_batch']:.2f} s, tokenizer {stream['tokenizer']:.2f} s"
    lines.append(("stream, first batch", text, "1 s", stream["first_batch"] < 1))
    return lines


def growth(path: Path, rows: int, folder: Path, cache: Path, work: Path) -> None:
    """Index time of a tenth, four tenths and all of a file."""
    print(f"\n{'linear growth':<28}{'rows':>12}{'index, s':>12}{'µs a row':>12}")
    for share in (0.1, 0.4, 1.0):
        part = work / f"part-{share}.jsonl"
        wanted = int(rows * share)
        with path.open("rb") as whole, part.open("wb") as file:
            for _, line in zip(range(wanted), whole, strict=False):
                file.write(line)
        found = measure("bucket", part, folder, cache / "growth")
        assert found["rows"] == wanted
        each = found["index"] / wanted * 1e6
        print(f"{share * 10:>4.0f}x{'':<23}{wanted:>12,}{found['index']:>12.2f}{each:>12.2f}")
        part.unlink()


def bytes_of(text: str) -> int:
    """The number of bytes that `1G`, `500M` stand for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: expected a size like 500M or 10G")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def machine() -> str:
    """The processor, its cores and the memory."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    )


def main() -> None:
    """Writes the corpora, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=bytes_of, nargs="+", default=[10**9], help="like 1G 10G")
    parser.add_argument(
        "--folder", type=Path, help="where corpora go and stay; else a temporary folder"
    )
    parser.add_argument(
        "--no_plan", action="store_true", help="leaves out the plan of 10 million rows"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.child:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: known.cores])
        result = child(known.child, known.path, known.tokenizer, known.cores)
        assert "torch" not in sys.modules
        print(json.dumps({**result, "peak_mb": peak_mb()}))
        return
    from scale_corpus import SHARED, write_corpus

    if not SHARED.is_dir():
        raise SystemExit(f"needs the shared data folder ({SHARED}); set SFTCORE_SHARED to it")
    folder = SHARED / "tokenizers" / "smollm2"
    with tempfile.TemporaryDirectory(dir=known.folder) as temporary:
        work = Path(temporary)
        check(folder, work)
        print(f"{machine()}; every row comes once an epoch (20 MB, bucket and pack)")
        for size in known.size:
            path = (known.folder or work) / f"corpus-{size}.jsonl"
            print(f"  writing {path} …", file=sys.stderr)
            rows = write_corpus(path, size)
            print(f"\n{path.stat().st_size / 1e9:.2f} GB, {rows:,} rows, SmolLM2's tokenizer")
            for name, found, goal, is_reached in report(path, rows, folder, work / f"cache-{size}"):
                verdict = "" if is_reached is None else "reached" if is_reached else "missed"
                print(f"{name:<28}{found:>36}{goal:>14}  {verdict}", flush=True)
            if size == min(known.size):
                growth(path, rows, folder, work / "cache", work)
    if not known.no_plan:
        print()
        subprocess.run(
            ["cargo", "bench", "--quiet", "-p", "sftcore", "--bench", "plan"], check=True
        )


if __name__ == "__main__":
    main()
