"""How a program that trains ends.

Threads of torch that outlive a process group may still let go of a tensor while Python ends. They then ask for an
interpreter that is no more, and the process aborts after all its work is done
(https://github.com/pytorch/pytorch/issues/190489). Not every engine lets go of its group, so a process that joined
one ends without taking Python down.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class _End:
    is_abrupt = False
    exit_code = 1  # of an error that nothing catches


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Runs the main function of a program, and ends the process with the exit code that it returns.

    For `sftcore` itself and for scripts that train under a launcher. What was registered with `atexit` runs.
    """
    atexit.register(_end)  # the first to be registered runs last
    try:
        _End.exit_code = main() or 0
    except SystemExit as end:
        code = end.code or 0
        _End.exit_code = code if isinstance(code, int) else 1
        raise
    sys.exit(_End.exit_code)


def end_abruptly() -> None:
    """Asks `run_program` to end the process right after what was registered with `atexit`."""
    _End.is_abrupt = True


def _end() -> None:
    if not _End.is_abrupt:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # a reader is gone, or it is closed
        _End.exit_code = _End.exit_code or 120  # as Python does
    os._exit(_End.exit_code)
