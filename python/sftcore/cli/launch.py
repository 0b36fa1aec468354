"""Starts the processes of a run: `NPROC_PER_NODE=2 sftcore train ...` is one command with two of them.

In come the variables that users of torchrun and of ms-swift know (NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT), out go the processes and their exit code. What happens to them is the matter of `agent.py`; here is what a
process and its launcher say to each other, without loading torch. An error is left in a file for the launcher, which
shows one: that of the process that failed first, not those of the ranks that lost it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcore.errors import CheckpointError, ConfigError, PeerError, SftcoreError

_VARIABLES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_PORT")
LAUNCHER_PID = "SFTCORE_LAUNCHER_PID"
"""Names the process that started this one, watches it and shows its error."""
LAUNCH_ID = "SFTCORE_LAUNCH_ID"
"""Names the life of a launcher, so that a run that is started anew finds what it wrote, and no older run."""
RESTARTS = "SFTCORE_RESTARTS"
"""Says how often the launcher has started the processes anew, for whatever reason."""
FAILED_FILE = "SFTCORE_FAILED_FILE"
"""Names a file that is there once a process failed: a SIGTERM that comes then is no wish to save and stop."""
_DEFAULT_PORT = 29500
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the processes of this node stand among all.

    Attributes:
        processes: Of this node.
        nodes: All nodes.
        node: The number of this one, from 0.
        address: Of node 0.
        port: Of node 0; 0 takes a free one.
        seconds: How long a node may be silent before it is taken for lost.
    """

    processes: int
    nodes: int
    node: int
    address: str
    port: int
    seconds: float


def is_wanted() -> bool:
    """Whether this process is to start others in place of training itself."""
    is_started = "RANK" in os.environ or "LOCAL_RANK" in os.environ
    return not is_started and ("NPROC_PER_NODE" in os.environ or "NNODES" in os.environ)


def launch(words: Sequence[str], *, max_restarts: int = 0) -> int:
    """Runs `sftcore WORDS` in as many processes as the environment says.

    Args:
        words: The command and its flags.
        max_restarts: How often all processes are started anew after a failure.

    Returns:
        The exit code of the run: 0, that of the process that failed first, or 128 and the signal that stopped it.

    Raises:
        ConfigError: A variable is missing or wrong.
    """
    place = read_place()
    if not os.environ.get("SFTCORE_DEBUG"):
        # it warns of each address without a name
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch is loaded once the variables are known to be right
    from sftcore.cli.agent import run_processes

    return run_processes(place, words, max_restarts=max_restarts)


def read_place() -> Place:
    """Returns what the environment says of this node.

    Raises:
        ConfigError: A variable is missing or wrong.
    """
    numbers = {"NPROC_PER_NODE": 1, "NNODES": 1, "NODE_RANK": 0, "MASTER_PORT": 0}
    for name in _VARIABLES:
        text = os.environ.get(name, str(numbers[name]))
        if name == "NPROC_PER_NODE" and text in ("gpu", "auto"):
            text = _count_gpus()
        if not text.isdecimal():
            raise ConfigError(f"{name}={text}: expected a whole number")
        numbers[name] = int(text)
    nodes, node, port = numbers["NNODES"], numbers["NODE_RANK"], numbers["MASTER_PORT"]
    for name in ("NPROC_PER_NODE", "NNODES"):
        if not numbers[name]:
            raise ConfigError(f"{name}=0: expected 1 or more")
    if node >= nodes:
        raise ConfigError(f"NODE_RANK={node} is out of range: expected 0 to {nodes - 1}")
    if port >= 2**16:
        raise ConfigError(f"MASTER_PORT={port} is out of range: expected 0 to {2**16 - 1}")
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if nodes > 1 and missing:
        raise ConfigError(
            f"NNODES={nodes} needs {' and '.join(missing)} too: the number of this node from 0, and the address of "
            "node 0, which all nodes reach"
        )
    silence = os.environ.get("SFTCORE_NODE_TIMEOUT", "60")
    if not silence.isdecimal() or int(silence) < 1:
        raise ConfigError(f"SFTCORE_NODE_TIMEOUT={silence}: expected whole seconds, 1 or more")
    return Place(
        processes=numbers["NPROC_PER_NODE"],
        nodes=nodes,
        node=node,
        address=os.environ["MASTER_ADDR"] if nodes > 1 else "127.0.0.1",
        port=port or (_DEFAULT_PORT if nodes > 1 else 0),
        seconds=float(silence),
    )


def _count_gpus() -> str:
    import torch

    return str(torch.cuda.device_count() or 1)


# -- in a process that was started -----------------------------------------------------------------------------------


def reports_to_launcher() -> bool:
    """Whether the launcher shows the error of this process, so that it need not."""
    return LAUNCHER_PID in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ


def follow_launcher() -> None:
    """Makes the system end this process when its launcher is gone, where the system can."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGKILL)  # it went before the system was told


def write_error(error: BaseException, text: str) -> None:
    """Leaves the error of this process for the launcher, in the form of torchrun's error files.

    Args:
        error: What ended the process.
        text: What a user reads.
    """
    message = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {
            "py_callstack": "".join(traceback.format_exception(error)),
            "timestamp": str(int(time.time())),
            "kind": type(error).__name__,
            "is_final": is_final(error),
            "text": text,
        },
    }
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    # the launcher may read it at any moment
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps({"message": message}), encoding="utf-8")
    fresh.replace(path)


def is_final(error: BaseException) -> bool:
    """Whether an error would come again if all processes were started anew, or was asked for."""
    if isinstance(error, KeyboardInterrupt):
        return True
    return isinstance(error, SftcoreError) and not isinstance(error, PeerError | CheckpointError)
