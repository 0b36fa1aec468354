"""Starts the processes of a run: `NPROC_PER_NODE=2 sftcore train ...` is one command with two of them.

In come the variables that users of torchrun and of ms-swift know (NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT), out go torchrun's agents and their exit code. Rank 0 speaks for all; where a process fails, its error
is the one that is shown, not those of the ranks that lost it. A stop (SIGTERM, Ctrl-C) reaches every process and waits
until the run is saved, while a process that failed takes the others with it within seconds.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sftcore.errors import ConfigError

_VARIABLES = ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
STOP_FILE = "SFTCORE_STOP_FILE"
"""Names a file that is there once the launcher was told to stop; without it, SIGTERM means that another rank failed."""
# a stop waits until a large checkpoint is written
_SECONDS_TO_SAVE = 1800


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
        ConfigError: A variable is missing or no number.
    """
    where = _read_variables()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if where["nproc_per_node"] > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(_threads(where["nproc_per_node"])))
    # with restarts the nodes find each other anew, else each has its fixed place
    is_static = where["nnodes"] > 1 and not max_restarts
    with tempfile.TemporaryDirectory(prefix="sftcore-") as folder:
        stop_file = Path(folder) / "stop"
        os.environ[STOP_FILE] = str(stop_file)
        config = LaunchConfig(
            min_nodes=where["nnodes"],
            max_nodes=where["nnodes"],
            nproc_per_node=where["nproc_per_node"],
            run_id=where["run_id"],
            rdzv_backend="static" if is_static else "c10d",
            rdzv_endpoint=where["endpoint"],
            rdzv_configs={"rank": where["node_rank"], "timeout": 900}
            if is_static
            else {"is_host": where["node_rank"] == 0, "timeout": 900},
            max_restarts=max_restarts,
            monitor_interval=0.5,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGHUP,SIGQUIT",
            shutdown_timeout=_SECONDS_TO_SAVE,
        )

        def stop(number: int, _: FrameType | None) -> None:
            stop_file.touch()
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_IGN)
            # the agent passes it on to the processes and waits for them
            raise SignalException(f"stopped by {number}", sigval=signal.Signals(number))

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            elastic_launch(config, sys.executable)("-m", "sftcore.cli", *words)
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except ChildFailedError as failed:
            return _report(failed.failures)
    return 0


def _read_variables() -> dict[str, Any]:
    numbers = {"NPROC_PER_NODE": 1, "NNODES": 1, "NODE_RANK": 0, "MASTER_PORT": 0}
    for name, default in numbers.items():
        text = os.environ.get(name, str(default))
        if name == "NPROC_PER_NODE" and text in ("gpu", "auto"):
            import torch

            text = str(torch.cuda.device_count() or 1)
        if not text.isdecimal():
            raise ConfigError(f"{name}={text}: expected a whole number")
        numbers[name] = int(text)
    nodes, node, port = numbers["NNODES"], numbers["NODE_RANK"], numbers["MASTER_PORT"]
    for name in ("NPROC_PER_NODE", "NNODES"):
        if not numbers[name]:
            raise ConfigError(f"{name}=0: expected 1 or more")
    if node >= nodes:
        raise ConfigError(f"NODE_RANK={node} is out of range: expected 0 to {nodes - 1}")
    address = os.environ.get("MASTER_ADDR")
    if nodes > 1:
        if missing := [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]:
            raise ConfigError(
                f"NNODES={nodes} needs {' and '.join(missing)} too: the number of this node from 0, and the address of "
                "node 0, which all nodes reach"
            )
        port = port or 29500
    elif not address:
        address = "127.0.0.1"
    return {
        "nproc_per_node": numbers["NPROC_PER_NODE"],
        "nnodes": nodes,
        "node_rank": node,
        "endpoint": f"{address}:{port}",
        # all nodes must say the same, and a run that is started once more is another one
        "run_id": os.environ.get("SFTCORE_RUN_ID")
        or (f"{address}:{port}" if nodes > 1 else f"{os.getpid()}-{time.time_ns()}"),
    }


def _threads(num_processes: int) -> int:
    """Returns the threads of each process: more than there are cores make torch many times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // num_processes)


def _report(failures: dict[int, Any]) -> int:
    """Prints the error of the process that failed first, and returns its exit code."""

    def order(rank: int) -> tuple[bool, float, int]:
        found = _read_error(failures[rank])
        return found.get("kind") == "PeerError", float(failures[rank].timestamp), rank

    first = min(failures, key=order)
    failure = failures[first]
    found = _read_error(failure)
    if text := found.get("text"):
        print(text, file=sys.stderr)
    elif failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        print(f"error: rank {first} was killed by {name}{hint}", file=sys.stderr)
    else:
        print(f"error: rank {first} ended with exit code {failure.exitcode}", file=sys.stderr)
    code = int(failure.exitcode)
    return 128 - code if code < 0 else code


def _read_error(failure: Any) -> dict[str, Any]:
    message = (failure.error_file_data or {}).get("message")
    extra = message.get("extraInfo") if isinstance(message, dict) else None
    return extra if isinstance(extra, dict) else {}


def reports_to_launcher() -> bool:
    """Whether the launcher shows the error of this process, so that it need not."""
    return STOP_FILE in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ


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
            "text": text,
        },
    }
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    path.write_text(json.dumps({"message": message}), encoding="utf-8")
