"""`sftcore train` under a launcher, as a user starts it, to be struck at a moment that its files show."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sftcore.train.checkpoints import list_checkpoints
from tiny_runs import contents

STEPS = 20
SFTCORE = [sys.executable, "-m", "sftcore.cli"]
# nothing of the machine that runs the tests, which may itself be one of several
_FOREIGN = (
    "NPROC_PER_NODE",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
)


def words_of(model: Path, rows: Path, output: Path, **settings: object) -> list[str]:
    """The command of a run with a checkpoint at each step, and dropout, so that a wrong random state shows."""
    given: dict[str, object] = {
        "model": model,
        "dataset": rows,
        "output_dir": output,
        "add_version": "false",
        "tuner_type": "lora",
        "lora_dropout": 0.2,
        "split_dataset_ratio": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "max_steps": STEPS,
        # curves are drawn at a save that follows a log, which takes longer than ten steps
        "logging_steps": 10,
        "save_steps": 1,
        "save_total_limit": 0,
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
        "report_to": "none",
        "template": "chatml",
    }
    given |= settings
    return ["train", *(str(word) for name in given for word in (f"--{name}", given[name]))]


class Run:
    """A launcher and its processes."""

    def __init__(
        self, words: Sequence[str], log: Path, *, command: Sequence[str] = SFTCORE, **variables: str
    ) -> None:
        """Starts `COMMAND WORDS` with some variables; what it writes goes to `LOG.out` and `LOG.err`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, *words], stdout=out, stderr=err, env=environment
            )

    def __enter__(self) -> Run:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.ranks().values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self.err.read_text()

    def ranks(self) -> dict[int, int]:
        """Each rank that this launcher started with its process."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "environ").read_bytes().decode(errors="replace")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            variables = dict(line.partition("=")[::2] for line in text.split("\0"))
            if variables.get("SFTCORE_LAUNCHER_PID") == str(self.process.pid) and state != "Z":
                found[int(variables["RANK"])] = int(folder.name)
        return found

    def wait_until(self, holds: Callable[[], object], *, seconds: float = 200) -> None:
        """Waits until something holds, and fails with what the run said where it ends before."""
        begun = time.monotonic()
        while not holds():
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() - begun < seconds, self.said[-3000:]
            time.sleep(0.002)

    def end(self, *, seconds: float = 200) -> int:
        """Waits for the end and returns the exit code."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still runs after {seconds} seconds: {self.said[-3000:]}"
            ) from None


def newest(folder: Path) -> int:
    """The step of the last checkpoint of a run; 0 before the first."""
    return max(list_checkpoints(folder), default=0) if folder.is_dir() else 0


def check_same_end(run: Path, whole: Path) -> None:
    """Holds the last checkpoint of a run that was interrupted to that of one that was not, bit for bit.

    A loss of several processes whose interval of the log was interrupted is summed in another order.
    """
    found, expected = (contents(folder / f"checkpoint-{STEPS}") for folder in (run, whole))
    losses = [[entry["loss"] for entry in one.pop("log")] for one in (found, expected)]
    assert found == expected
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
