"""Runs parts one after the other, each in processes of its own and within its time, and keeps what they find.

A part is a command that writes its cases to `WORK/NAME.json` as it goes, those to come as `not reached`. All found so
far is in one file at any time: that file is replaced, never rewritten in place, whenever a case ends. A part that hangs
is ended with all the processes that it started, and one that dies is noted with its last words; the next part runs
either way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the exit code of a part that has nothing to do on this machine
SKIPPED = 77
# the status of a case, or of a part, whose turn has not come
NOT_REACHED = "not reached"
# less than this is not worth the start of a process
_LEAST_SECONDS = 5.0
_LAST_WORDS = 3000
# the variable by which all processes of a part are known, also those in sessions of their own
_MARK = "SFTCORE_GPU_CHECK_PART"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What runs in processes of its own.

    Attributes:
        name: Its name, for `--parts` too.
        command: What is run.
        seconds: The most that it may take.
        environment: Its variables; None for those of this process.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] | None = None


def write_whole(path: Path, value: Any) -> None:
    """Writes a value as JSON so that a reader sees the old file or the new one, and nothing between."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1), encoding="utf-8")
    new.replace(path)


def run_parts(
    parts: Sequence[Part], *, seconds: float, work: Path, out: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Runs parts in order, printing and writing each result at once.

    Args:
        parts: What to run.
        seconds: The most that all may take together.
        work: The folder for the files of the parts.
        out: The file of all results.
        about: What else goes into that file.

    Returns:
        By name: `status` (`passed`, `failed`, `skipped`, `cut off` or `not reached`), `seconds`, `cases` (by
        name what the part found), and where it did not pass, `words`: the end of what it wrote.
    """
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {part.name: {"status": NOT_REACHED} for part in parts}
    end = time.monotonic() + seconds
    write_whole(out, about | {"parts": results})
    for part in parts:
        left = end - time.monotonic()
        if left < min(_LEAST_SECONDS, part.seconds, seconds / 2):
            print(f"{part.name}: not reached, as all {seconds:g} seconds are gone", flush=True)
            continue
        results[part.name] = {"status": "running"}
        limit = min(part.seconds, left)
        for found in _run(part, limit, work):
            results[part.name] = found
            write_whole(out, about | {"parts": results})
        _show(part.name, results[part.name])
    write_whole(out, about | {"parts": results})
    return results


def _run(part: Part, limit: float, work: Path) -> Iterator[dict[str, Any]]:
    """Yields what a part has found so far whenever that changed, and last how it ended."""
    path, log = work / f"{part.name}.json", work / f"{part.name}.log"
    path.unlink(missing_ok=True)
    begun = time.monotonic()
    shown: dict[str, Any] = {}
    mark = f"{part.name} of {os.getpid()} at {time.time_ns()}"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**(part.environment or os.environ), _MARK: mark},
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                over = time.monotonic() - begun >= limit
                ended = process.returncode is not None
                cases = _cases(path)
                if cases != shown and not ended:
                    yield {"status": "running", "cases": cases}
                for name, case in cases.items():
                    if case != shown.get(name) and case.get("status") != NOT_REACHED:
                        print(f"{part.name}: {name}: {_line(case)}", flush=True)
                shown = cases
                if ended or over:
                    break
        finally:
            # what the part started goes with it, also where it ended itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _end_all(mark)
    seconds = round(time.monotonic() - begun, 2)
    ends = {0: "passed", SKIPPED: "skipped"}
    status = ends.get(process.returncode, "failed") if ended else "cut off"
    found: dict[str, Any] = {"status": status, "seconds": seconds, "cases": _cases(path)}
    if status != "passed":
        found["words"] = log.read_text(encoding="utf-8", errors="replace").strip()[-_LAST_WORDS:]
    if status == "failed":
        found["exit_code"] = process.returncode
    if status == "cut off":
        found["limit"] = round(limit, 2)
    yield found


def _end_all(mark: str) -> None:
    """Ends what a part has left running."""
    wanted = f"{_MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def _cases(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _line(case: dict[str, Any]) -> str:
    shown, blocks = [], []
    for name, value in case.items():
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        if "\n" in text:
            blocks.append(text.rstrip())
        elif name == "status":
            shown.append(text)
        else:
            shown.append(f"{name} {text if len(text) < 200 else text[:200] + ' ...'}")
    return "\n".join([", ".join(shown), *blocks])


def _show(name: str, found: dict[str, Any]) -> None:
    words = found.get("words", "").splitlines()
    last = f": {words[-1][:300]}" if words else ""
    left = [name for name, case in found["cases"].items() if case.get("status") == NOT_REACHED]
    if left:
        last += f"; not reached: {', '.join(left)}"
    print(f"{name}: {found['status']} after {found['seconds']:.0f} s{last}", flush=True)
