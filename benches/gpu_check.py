"""What a GPU proves of sftcore, in parts of their own time, the most important first.

    python benches/gpu_check.py --pack .gpu [--parts first speed]

`.gpu` is what `make gpu-pack` filled. Its wheels are installed offline into `WORK/site-packages`, which the parts take
them from; without wheels they take what this Python has. Models are made at random. Without a GPU a tiny shape goes
through every part. Results go to `$OUT/gpu-check.json`, or to `--out`, after each case. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.runner import Part, run_parts

# the most that each takes
SECONDS = {
    "versions": 25.0,
    "first": 40.0,
    "tests": 90.0,
    "speed": 120.0,
    "trl": 45.0,
    "switches": 60.0,
    "equality": 70.0,
    "profile": 30.0,
}
MFU = (
    "FLOP of the steps / their seconds / the GPU's FLOP/s in dense bfloat16. A token takes, for each weight of a "
    "matrix, 6 FLOP where weights are trained and 4 where they are frozen, the head for trained tokens alone; and 6 x "
    "layers x heads x head size x the length of its example, for attention. Embeddings, padding and what "
    "checkpointing computes again do not count; of experts those that a token goes to."
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pack", type=Path, default=Path(".gpu"))
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--seconds", type=float, default=480.0, help="the most that all parts take")
    parser.add_argument(
        "--slack",
        type=float,
        default=1.0,
        help="times the seconds of each part; --seconds bounds all",
    )
    parser.add_argument("--work", type=Path, default=Path("target/gpu-check"))
    out = Path(os.environ.get("OUT", ".")) / "gpu-check.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pack, work = options.pack.resolve(), options.work.resolve()
    if options.part:
        return _part(options.part, pack, work)
    if not (pack / "data" / "tokenizers").is_dir():
        parser.error(f"--pack {options.pack} has no tokenizer; make gpu-pack fills it")
    for folder in (work, options.out.resolve().parent):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    about: dict[str, Any] = {"python": platform.python_version(), "machine": platform.platform()}
    about["mfu"] = MFU
    if any((pack / "wheels").glob("*.whl")):
        from gpu.install import install  # what it needs is not there before a pack is

        # by this name dill, with which datasets takes a hash of what it is given, knows what is installed
        site = work / "site-packages"
        about["wheels"] = wheels = install(pack, site)
        print(f"wheels: {len(wheels['installed'])} installed", flush=True)
        for name, reason in wheels["left out"].items():
            print(f"left out: {name}: {reason}", flush=True)
        paths = [str(site), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    words = ["--pack", str(pack), "--work", str(work)]
    parts = [
        Part(
            name=name,
            command=[sys.executable, __file__, *words, "--part", name],
            seconds=SECONDS[name] * options.slack,
            environment=environment,
        )
        for name in options.parts
    ]
    found = run_parts(parts, seconds=options.seconds, work=work, out=options.out, about=about)
    return 0 if all(one["status"] in ("passed", "skipped") for one in found.values()) else 1


def _part(name: str, pack: Path, work: Path) -> int:
    # a part loads what it needs: one that cannot be loaded leaves the others
    if name == "versions":
        return _versions(work)
    if name == "first":
        return _first(pack, work)
    if name == "tests":
        from gpu.marked_tests import marked_tests as part
    elif name == "speed":
        from gpu.speed import speed as part
    elif name == "trl":
        from gpu.speed import trl as part
    elif name == "switches":
        from gpu.switches import switches as part
    elif name == "equality":
        from gpu.equality import equality as part
    else:
        from gpu.one_step import one_step as part
    return part(pack, work)


def _versions(work: Path) -> int:
    from gpu.cases import Cases

    cases = Cases(work / "versions.json", ["env", "torch"])

    def env() -> dict[str, object]:
        command = [sys.executable, "-m", "sftcore.cli", "env"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        return {"text": done.stdout}

    def of_torch() -> dict[str, object]:
        import torch

        found: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found |= {
                "device": torch.cuda.get_device_name(),
                "capability": list(torch.cuda.get_device_capability()),
                "free_gib": free / 2**30,
                "total_gib": total / 2**30,
                "nccl": list(torch.cuda.nccl.version()),
            }
        return found

    cases.run("env", env)
    cases.run("torch", of_torch)
    return cases.exit_code()


def _first(pack: Path, work: Path) -> int:
    from gpu.cases import Cases
    from gpu.measure import run_ours
    from gpu.shapes import make_rows, make_shape
    from gpu.speed import SHORT

    name = "lora 1B, 10 steps on the same rows"
    cases = Cases(work / "first.json", [name])

    def ten_steps() -> dict[str, object]:
        shape = make_shape("1B", pack, work)
        few = make_rows(pack, work / "few.jsonl", max_length=SHORT, count=4)
        found = run_ours(shape, few, work / "first", max_length=SHORT, max_steps=10)
        losses = found["losses"]
        if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
            raise AssertionError(f"the loss is not finite or did not fall: {json.dumps(losses)}")
        return found

    cases.run(name, ten_steps)
    return cases.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
