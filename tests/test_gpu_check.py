"""The runner of `benches/gpu_check.py`: a part that hangs or dies is cut off and told, and the others run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).parent.parent / "benches"
sys.path.insert(0, str(BENCHES))

from gpu.runner import SKIPPED, Part, run_parts


def part(name: str, code: str, *, seconds: float = 60.0) -> Part:
    return Part(name=name, command=[sys.executable, "-c", code], seconds=seconds)


def run(parts: list[Part], folder: Path, seconds: float = 100.0) -> dict[str, Any]:
    out = folder / "out.json"
    found = run_parts(parts, seconds=seconds, work=folder / "work", out=out, about={"a": 1})
    assert json.loads(out.read_text()) == {"a": 1, "parts": found}
    return found


def test_a_part_that_dies_or_hangs_is_cut_off_and_the_rest_goes_on(tmp_path: Path) -> None:
    case = tmp_path / "work" / "hangs.json"
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time, pathlib\n"
        f'pathlib.Path({str(case)!r}).write_text(\'{{"first": {{"x": 1}}}}\')\n'
        "code = 'import time; time.sleep(600)'\n"
        f"pid = subprocess.Popen([sys.executable, '-c', code]).pid\n"
        f"pathlib.Path({str(child)!r}).write_text(str(pid))\n"
        "time.sleep(600)\n"
    )
    parts = [
        part("dies", "import os; print('last words', flush=True); os.abort()"),
        part("fails", "raise ValueError('no good')"),
        part("hangs", hangs, seconds=4.0),
        part("skips", f"print('needs a GPU'); raise SystemExit({SKIPPED})"),
        part("passes", "print('fine')"),
    ]
    begun = time.monotonic()
    found = run(parts, tmp_path)
    assert time.monotonic() - begun < 60
    statuses = {name: one["status"] for name, one in found.items()}
    assert statuses == {
        "dies": "failed",
        "fails": "failed",
        "hangs": "cut off",
        "skips": "skipped",
        "passes": "passed",
    }
    assert (found["dies"]["exit_code"], found["dies"]["words"]) == (-6, "last words")
    assert "ValueError: no good" in found["fails"]["words"]
    # what it had found before it hung is kept, and what it started is gone too
    assert found["hangs"]["cases"] == {"first": {"x": 1}}
    assert found["skips"]["words"] == "needs a GPU"
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_there_is_no_time_for_is_said_not_to_be_reached(tmp_path: Path) -> None:
    slow = "import time; time.sleep(600)"
    found = run([part("slow", slow), part("late", "print()")], tmp_path, seconds=4.0)
    assert found["slow"]["status"] == "cut off"
    assert found["late"] == {"status": "not reached"}
