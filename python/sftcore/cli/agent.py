"""The launcher at work: torchrun's agent, which starts the processes of a node, watches them and starts them anew.

In come the place of this node and a command, out goes an exit code. Two things end processes, and they hear which
one it is: a stop (SIGTERM, Ctrl-C, a lost terminal) reaches every process and waits until the run is saved, while a
process that failed takes the others with it within seconds. A node that falls silent is a failure too, for a broken
line says nothing by itself. A second stop ends all at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, registry

from sftcore.cli.launch import FAILED_FILE, LAUNCH_ID, LAUNCHER_PID, RESTARTS, Place
from sftcore.cli.nodes import NodeWatch, wait_for_first_node
from sftcore.errors import ConfigError

# a stop waits until a large checkpoint is written
_SECONDS_TO_SAVE = 1800
# what a process has to end by itself when another one failed
_SECONDS_TO_FAIL = 5
_SECONDS_TO_JOIN = 900
_SECONDS_BETWEEN_STOPS = 1.0
_OF_STOPS = ("StoppedError", "KeyboardInterrupt")
_STOPS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a process ended.

    Attributes:
        rank: The process.
        code: Its exit code, or the negative number of the signal that ended it.
        kind: The class of its error; empty where it left none.
        text: What a user is to read of it; empty where it left nothing.
        is_final: Whether it would come again, or was asked for.
    """

    rank: int
    code: int
    kind: str
    text: str
    is_final: bool

    @property
    def exit_code(self) -> int:
        """What a command exits with, as a shell shows it."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def lost_another(self) -> bool:
        """Whether it is no more than the echo of another failure."""
        return self.kind == "PeerError"

    def describe(self, *, names_rank: bool = False) -> str:
        """Returns a line for people, or the traceback of a bug."""
        if self.text:
            head, mark, rest = self.text.partition("error: ")
            is_line = names_rank and mark and not head
            return f"error: rank {self.rank}: {rest}" if is_line else self.text
        if self.code >= 0:
            return f"error: rank {self.rank} ended with exit code {self.code}"
        name = signal.Signals(-self.code).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"error: rank {self.rank} was killed by {name}{hint}"


def run_processes(place: Place, words: Sequence[str], *, max_restarts: int) -> int:
    """Runs `sftcore WORDS` in the processes of this node.

    Args:
        place: Where this node stands.
        words: The command and its flags.
        max_restarts: How often all processes are started anew after a failure.

    Returns:
        0, the exit code of the process that failed first, or 128 and the signal that stopped the run.

    Raises:
        ConfigError: The address or the port of node 0 cannot be used.
    """
    if not os.environ.get("SFTCORE_DEBUG"):
        _silence(logging.getLogger("torch.distributed.elastic"))
    with tempfile.TemporaryDirectory(prefix="sftcore-") as folder:
        failed_file = Path(folder) / "failed"
        _set_environment(place, failed_file)
        # until there are processes, a stop ends the launcher as it ends any other program
        agent = _make_agent(place, words, max_restarts, Path(folder), failed_file)
        with agent:
            return agent.run_to_end()


def _silence(logger: logging.Logger) -> None:
    """Keeps torchrun's own words to itself: it reports each failure in its own form, with all that it ended."""
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _set_environment(place: Place, failed_file: Path) -> None:
    os.environ[FAILED_FILE] = str(failed_file)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ[LAUNCH_ID] = uuid.uuid4().hex
    # the agent would take SIGTERM and Ctrl-C for its own, and SIGHUP even under nohup
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    # the processes of each start meet at a port of their own
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if place.processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(_threads(place.processes)))
    if place.nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface_to(place.address, place.port)


def _threads(num_processes: int) -> int:
    """Returns the threads of each process: more than there are cores make torch many times slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // num_processes)


def interface_to(address: str, port: int) -> str:
    """Returns the network interface by which this node reaches another one, or on which it is that node itself.

    Left alone, gloo takes the interface of the host name, which on many systems is the loopback.

    Raises:
        ConfigError: There is no way to the address.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # nothing is sent
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR={address} cannot be reached from this node ({error.strerror or error}); expected the address "
            "of node 0"
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return str(name)
    raise ConfigError(
        f"no network interface of this node has {own}, by which it reaches MASTER_ADDR={address}; name one with "
        "GLOO_SOCKET_IFNAME"
    )


def _make_agent(
    place: Place, words: Sequence[str], max_restarts: int, folder: Path, failed_file: Path
) -> Agent:
    if place.node:
        wait_for_first_node(place, _SECONDS_TO_JOIN)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{place.address}:{place.port}",
        # all nodes must say the same; the store of the rendezvous ends with the launcher of node 0
        run_id="sftcore",
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        # nodes are ranked by it, so that the ranks of NODE_RANK=0 come first, after a restart too
        local_addr=f"{place.node:06d}",
        is_host=place.node == 0,
        join_timeout=_SECONDS_TO_JOIN,
        read_timeout=30,
    )
    try:
        handler = registry.get_rendezvous_handler(parameters)
    except RendezvousError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(
            f"node {place.node} cannot use {place.address}:{place.port} ({reason}); MASTER_ADDR is to be an address of "
            "node 0, and MASTER_PORT a free port there, the same on all nodes"
        ) from error
    spec = WorkerSpec(
        role="rank",
        local_world_size=place.processes,
        entrypoint=sys.executable,
        args=("-m", "sftcore.cli", *words),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.2,
        master_addr=place.address,
    )
    return Agent(spec, DefaultLogsSpecs(log_dir=str(folder)), place=place, failed_file=failed_file)


class Agent(LocalElasticAgent):
    """Runs the processes of this node, and knows why they ended."""

    def __init__(
        self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, *, place: Place, failed_file: Path
    ) -> None:
        super().__init__(spec, logs_specs, shutdown_timeout=_SECONDS_TO_SAVE)
        self.place = place
        self.failed_file = failed_file
        self.watch = NodeWatch(place) if place.nodes > 1 else None
        # of this start: the processes that ended by themselves, in the order in which that was seen
        self.failures: list[Failure] = []
        self.lost_node: int | None = None
        self._starts = 0
        self._failed_at = 0.0
        self._stopped_at = 0.0
        self._stopped_by = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Agent:  # noqa: PYI034
        for number in _STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._stop)
        if hasattr(signal, "SIGUSR1"):
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._pass_on)
        if self.watch:
            self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.watch:
            self.watch.stop()

    def run_to_end(self) -> int:
        """Runs the processes, says why they ended, and returns the exit code of the run."""
        handler = self._worker_group.spec.rdzv_handler
        try:
            result = self.run()
            if self.lost_node != 0:
                # other nodes hear of it, and do not wait for this one
                handler.shutdown()
        except SignalException:
            return self._end_stopped()
        except RendezvousError as error:
            return self._end_apart(str(error).splitlines()[0])
        if result is None:
            return self._end_apart("the run ended while this node waited to join it")
        if result.state == WorkerState.SUCCEEDED:
            return 0
        print(self._cause(), file=sys.stderr)
        return self.failures[0].exit_code if self.failures else 1

    # -- signals -------------------------------------------------------------------------------------------------

    def _stop(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._stopped_at:
            self._stopped_at = now
            # the processes know SIGTERM and SIGINT; run() passes it on to them, and waits
            passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            self._stopped_by = number
            raise SignalException(f"stopped by {number}", sigval=passed)
        # schedulers tell each process of a job, some more than once
        if now - self._stopped_at > _SECONDS_BETWEEN_STOPS:
            for process in self._processes().values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Hands SIGUSR1 to the processes that are far enough to take it, for it would end the others."""
        for process in self._processes().values():
            if process.poll() is None and _takes(process.pid, number):
                process.send_signal(number)

    def _end_stopped(self) -> int:
        """Says what the stop has led to."""
        found = [
            self._failure(rank) for rank, process in self._processes().items() if process.poll()
        ]
        errors = [one for one in found if one.text and one.kind not in (*_OF_STOPS, "PeerError")]
        saved = [one for one in found if one.kind == "StoppedError"]
        if errors:
            print(errors[0].describe(), file=sys.stderr)
            return errors[0].exit_code
        name = signal.Signals(self._stopped_by).name
        print(
            saved[0].text if saved else f"stopped by {name}, with nothing new to save",
            file=sys.stderr,
        )
        return 128 + self._stopped_by

    # -- failures ------------------------------------------------------------------------------------------------

    def _processes(self) -> dict[int, Any]:
        """Returns each local rank with its process."""
        context = self._pcontext
        handlers = context.subprocess_handlers if isinstance(context, SubprocessContext) else {}
        return {rank: handler.proc for rank, handler in handlers.items()}

    def _failure(self, local_rank: int) -> Failure:
        context = self._pcontext
        assert isinstance(context, SubprocessContext)
        process = context.subprocess_handlers[local_rank].proc
        found = ProcessFailure(
            local_rank=local_rank,
            pid=process.pid,
            exitcode=process.returncode,
            error_file=context.error_files[local_rank],
        )
        message = found.error_file_data.get("message")
        extra = message.get("extraInfo", {}) if isinstance(message, dict) else {}
        return Failure(
            rank=self._worker_group.workers[local_rank].global_rank,
            code=found.exitcode,
            kind=str(extra.get("kind", "")),
            text=str(extra.get("text", "")),
            is_final=bool(extra.get("is_final")),
        )

    def _note_failures(self) -> None:
        known = {failure.rank for failure in self.failures}
        fresh = [
            self._failure(rank) for rank, process in self._processes().items() if process.poll()
        ]
        fresh = [failure for failure in fresh if failure.rank not in known]
        if fresh and not self.failures:
            self._failed_at = time.monotonic()
        self.failures += fresh
        self.failures.sort(key=lambda failure: failure.lost_another)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._note_failures()
        if self.failures:
            running = [one for one in self._processes().values() if one.poll() is None]
            is_young = time.monotonic() - self._failed_at < _SECONDS_TO_FAIL
            if running and is_young:
                # the others end by themselves, among them perhaps the one whose error matters
                return RunResult(state=WorkerState.HEALTHY)
            return self._give_up(WorkerState.FAILED)
        self.lost_node = self.watch.lost() if self.watch else None
        if self.lost_node is not None:
            return self._give_up(WorkerState.UNHEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            # one failed since the look above; the agent has ended the others, and knows it as the first
            failed = [self._failure(each.local_rank) for each in result.failures.values()]
            self.failures = sorted(failed, key=lambda failure: failure.lost_another)
            return self._give_up(WorkerState.FAILED)
        return result

    def _give_up(self, state: WorkerState) -> RunResult:
        """Ends the processes that are left, and keeps the run from starting anew where that is of no use."""
        if self.lost_node == 0 or any(failure.is_final for failure in self.failures):
            self._remaining_restarts = 0
        self._shutdown()
        return RunResult(state=state)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _SECONDS_TO_FAIL
    ) -> None:
        if not self._stopped_at or self.failures or self.lost_node is not None:
            self.failed_file.touch()
            timeout = _SECONDS_TO_FAIL
        super()._shutdown(death_sig, timeout)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.failures, self.lost_node = [], None
        self.failed_file.unlink(missing_ok=True)
        os.environ[RESTARTS] = str(self._starts)
        self._starts += 1
        if self.watch:
            self.watch.start_over()
        return dict(super()._start_workers(worker_group))

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        done = worker_group.spec.max_restarts - self._remaining_restarts
        if self.failures or self.lost_node is not None:
            print(
                f"{self._cause()}\nstarting all processes anew ({done} of {worker_group.spec.max_restarts})",
                file=sys.stderr,
            )
        else:
            print("a node came back: starting all processes anew", file=sys.stderr)
        super()._restart_workers(worker_group)

    def _cause(self) -> str:
        """Returns why the processes of this start ended, in words for people."""
        if self.failures:
            first = self.failures[0]
            is_of_all = sum(failure.text == first.text for failure in self.failures) > 1
            is_alone = self._worker_group.workers[0].world_size == 1
            # a wrong setting or row is found by every rank
            return first.describe(names_rank=not is_of_all and not is_alone)
        assert self.lost_node is not None
        if self.lost_node == 0:
            return (
                f"error: node 0 was not heard of for {self.place.seconds:.0f} seconds: it is down, or its line is; as "
                "it keeps the nodes together, start all launchers again, with --resume_from_checkpoint last"
            )
        return (
            f"error: node {self.lost_node} was not heard of for {self.place.seconds:.0f} seconds: it is down, or its "
            "line is; the last checkpoint is good (--resume_from_checkpoint last)"
        )

    def _end_apart(self, reason: str) -> int:
        """Says why the nodes are not together."""
        if self.place.node:
            reason = f"node 0 has ended or cannot be reached; its last lines say why ({reason})"
        elif self.lost_node is not None:
            reason = f"node {self.lost_node} did not come back within {_SECONDS_TO_JOIN} seconds ({reason})"
        else:
            reason = f"the nodes did not come together within {_SECONDS_TO_JOIN} seconds ({reason})"
        print(f"error: {reason}", file=sys.stderr)
        return 1


def _takes(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, where the system tells."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
