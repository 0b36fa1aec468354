"""Runs that are struck by signals, each in a process forked from this one, so that torch is imported once.

`python killed_runs.py SCENARIO MODEL ROWS FOLDER` prints what happened as JSON. It starts no thread before a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftcore.cli import main
from sftcore.train import log, train
from sftcore.train.checkpoints import find_fault, list_checkpoints
from sftcore.train.trainer import SftTrainer
from tiny_runs import config_of

KILLS = 10
# the curves of a run take longer than its steps
log.draw_curves = lambda history, folder: []  # type: ignore[assignment]


def fork(run: Callable[[], int]) -> int:
    """Starts a process that ends with what `run` returns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_for(child: int, holds: Callable[[], bool]) -> bool:
    """Waits until something holds, and returns whether the process still runs."""
    while not holds():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.001)
    return True


def newest(folder: Path) -> int:
    return max(list_checkpoints(folder), default=0) if folder.is_dir() else 0


def kill_again_and_again(model: Path, rows: Path, folder: Path) -> Any:
    """Kills a run at random moments until it was killed ten times, and then lets it end."""
    chance = random.Random(5)
    settings: dict[str, Any] = {"save_steps": 1, "gradient_accumulation_steps": 1}
    whole = config_of(model, rows, folder / "whole", **settings)
    assert os.waitpid(fork(lambda: len(train(whole)) * 0), 0)[1] == 0
    run = folder / "run"
    config = config_of(model, rows, run, resume_from_checkpoint="auto", **settings)
    rounds = []
    for _ in range(KILLS):
        begun = newest(run)
        child = fork(lambda: len(train(config)) * 0)
        wanted = begun + chance.randrange(1, 3)
        runs = wait_for(child, lambda wanted=wanted: newest(run) >= wanted)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.15))
        seen = newest(run)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        there = list_checkpoints(run)
        rounds.append(
            {
                "killed": runs and os.WIFSIGNALED(status),
                "begun": begun,
                "seen": seen,
                "newest": max(there),
                "faults": [fault for step in there if (fault := find_fault(there[step]))],
                "unfinished": [path.name for path in run.glob(".checkpoint-*")],
            }
        )
    assert os.waitpid(fork(lambda: len(train(config)) * 0), 0)[1] == 0
    return rounds


def strike_the_command(model: Path, rows: Path, folder: Path) -> Any:
    """Sends signals to `sftcore train` and returns the status of each process and what it left."""
    words = ["train", "--model", str(model), "--dataset", str(rows), "--add_version", "false"]
    words += ["--split_dataset_ratio", "0", "--save_steps", "3", "--save_total_limit", "0"]
    words += [
        "--gradient_accumulation_steps",
        "1",
        "--template",
        "chatml",
        "--num_train_epochs",
        "50",
    ]
    found: dict[str, Any] = {}
    for name, number in {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.items():
        run = folder / name
        child = fork(lambda run=run: main([*words, "--output_dir", str(run)]))  # type: ignore[misc]
        wait_for(child, lambda run=run: newest(run) >= 3)  # type: ignore[misc]
        if not found:
            again = [*words, "--output_dir", str(run), "--resume_from_checkpoint", "last"]
            _, status = os.waitpid(fork(lambda: main(again)), 0)  # noqa: B023
            found["second run"] = {"status": os.waitstatus_to_exitcode(status), "first": child}
        os.kill(child, number)
        found[name] = left_by(child, run)

    run = folder / "twice"

    def save_without_end() -> int:
        original = SftTrainer._save

        def save(trainer: Any, *arguments: Any, **named: Any) -> None:
            original(trainer, *arguments, **named)
            if newest(run):
                (run / "saving").touch()
                time.sleep(200)

        SftTrainer._save = save  # type: ignore[method-assign]
        return main([*words, "--output_dir", str(run)])

    child = fork(save_without_end)
    wait_for(child, (run / "saving").exists)
    for _ in range(2):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.5)
    found["twice"] = left_by(child, run)
    return found


def left_by(child: int, run: Path) -> dict[str, Any]:
    _, status = os.waitpid(child, 0)
    there = list_checkpoints(run)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "steps": sorted(there),
        "faults": [fault for step in there if (fault := find_fault(there[step]))],
        "has_result": (run / "result.json").exists(),
    }


if __name__ == "__main__":
    scenario, *paths = sys.argv[1:]
    print(json.dumps(globals()[scenario](*map(Path, paths))))
