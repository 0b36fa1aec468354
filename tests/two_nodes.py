"""Two nodes on one machine: network namespaces with addresses of their own, joined by a line that can be cut.

    python tests/two_nodes.py MODEL ROWS FOLDER

runs as root, prints what happened as JSON, and takes the namespaces down whatever happens. `why_not` says why it
cannot run here. Each node has a launcher and one process; they share the disk, as nodes of a cluster do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launched_runs import SFTCORE, Run, newest, words_of
from sftcore.train.checkpoints import find_fault, list_checkpoints

ADDRESSES = ("10.77.23.1", "10.77.23.2")
SILENCE = 8


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def names() -> tuple[str, str]:
    return f"sft{os.getpid()}a", f"sft{os.getpid()}b"


def why_not() -> str | None:
    """Returns why this machine has no network namespaces for us; None where it has."""
    if sys.platform != "linux" or os.geteuid():
        return "needs root on Linux"
    if shutil.which("ip") is None:
        return "needs the command ip (package iproute2)"
    try:
        with network():
            return None
    except OSError as error:
        return f"the kernel refuses: {error}"


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces and the line between them."""
    try:
        for name in names():
            ip("netns", "add", name)
        first, second = names()
        ip("link", "add", "line", "netns", first, "type", "veth", "peer", "name", "line", "netns", second)  # fmt: skip
        for name, address in zip(names(), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "line")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "line", "up")
        yield
    finally:
        for name in names():
            with contextlib.suppress(OSError):
                ip("netns", "del", name)


def switch(state: str) -> None:
    """Cuts the line of node 1, or joins it again; no node is told, packets just get lost."""
    ip("-n", names()[1], "link", "set", "line", state)


def start(node: int, words: list[str], log: Path) -> Run:
    return Run(
        words,
        log,
        command=["ip", "netns", "exec", names()[node], *SFTCORE],
        NNODES="2",
        NODE_RANK=str(node),
        NPROC_PER_NODE="1",
        MASTER_ADDR=ADDRESSES[0],
        SFTCORE_NODE_TIMEOUT=str(SILENCE),
    )


def undisturbed(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """The node that is waited for comes last."""
    words = words_of(model, rows, folder / "whole")
    with start(1, words, folder / "whole1") as second:
        second.wait_until(lambda: "waiting for node 0" in second.said)
        with start(0, words, folder / "whole0") as first:
            codes = first.end(), second.end()
    return {"codes": codes, "said": (first.said, second.said), "out": first.out.read_text()}


def cut(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """The line is cut in the middle of a run."""
    run = folder / "run"
    words = words_of(model, rows, run)
    with start(0, words, folder / "cut0") as first, start(1, words, folder / "cut1") as second:
        first.wait_until(lambda: newest(run) >= 4)
        begun = time.monotonic()
        switch("down")
        try:
            codes = first.end(), second.end()
        finally:
            switch("up")
        took = time.monotonic() - begun
        left = {**first.ranks(), **second.ranks()}
    steps = list_checkpoints(run)
    return {
        "codes": codes,
        "said": (first.said, second.said),
        "took": took,
        "left": list(left),
        "newest": newest(run),
        "fault": find_fault(steps[max(steps)]),
    }


def back(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """The same, and the launcher of the lost node is started again when the line is there."""
    run = folder / "run"
    words = words_of(model, rows, run, max_restarts=1, resume_from_checkpoint="last")
    with start(0, words, folder / "back0") as first:
        with start(1, words, folder / "back1") as second:
            first.wait_until(lambda: newest(run) >= 10)
            switch("down")
            lost = second.end()
            first.wait_until(lambda: "starting all processes anew" in first.said)
        switch("up")
        with start(1, words, folder / "again1") as second:
            codes = first.end(), second.end()
    return {"lost": lost, "codes": codes, "said": (first.said, second.said)}


def main() -> None:
    model, rows, folder = map(Path, sys.argv[1:])
    if reason := why_not():
        print(f"skipped: {reason}", file=sys.stderr)
        sys.exit(5)
    with network():
        found = {
            scenario.__name__: scenario(model, rows, folder)
            for scenario in (undisturbed, cut, back)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
