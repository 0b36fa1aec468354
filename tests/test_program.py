"""The end of a process: what it leaves, and with which exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# `down` is printed only where Python is taken down
PROGRAM = """
import atexit, sys
from sftcore.program import end_abruptly, run_program

class Sentinel:
    def __del__(self, print=print):
        print("down")

sentinel = Sentinel()

def main():
    atexit.register(print, "exit functions")
    if "abrupt" in sys.argv:
        end_abruptly()
    print("work")
    {last}

run_program(main)
"""


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("return 3", 3),
        ("pass", 0),
        ("sys.exit(4)", 4),
        ("sys.exit('a reason')", 1),
        ("sys.exit()", 0),
        ("raise ValueError", 1),
    ],
)
def test_a_process_ends_with_its_code_with_and_without_python(last: str, code: int) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM.format(last=last), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    usual, abrupt = run(), run("abrupt")
    assert usual.returncode == abrupt.returncode == code
    assert usual.stdout == "work\nexit functions\ndown\n"
    assert abrupt.stdout == "work\nexit functions\n"
    assert usual.stderr == abrupt.stderr
    assert ("a reason" in abrupt.stderr) == ("a reason" in last)
    assert ("Traceback" in abrupt.stderr) == ("raise" in last)


def test_output_that_cannot_be_written_is_a_failure() -> None:
    command = [sys.executable, "-c", PROGRAM.format(last="pass"), "abrupt"]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, env=buffered, check=False)
    assert done.returncode == 120
