"""The launcher at work: torchrun's agent, which starts the processes of a node, watches them and starts them anew.

In come the place of this node and a command, out goes an exit code. Two things end processes, and they hear which
one it is: a stop (SIGTERM, Ctrl-C, a lost terminal) reaches every process and waits until the run is saved, while a
process that failed takes the others with it within seconds. A node that falls silent is a failure too, for a broken
line says nothing by itself. A second stop ends all at once.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

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

from sftcore.cli.failures import Failure, read_failure
from sftcore.cli.launch import FAILED_FILE, LAUNCH_ID, LAUNCHER_PID, RESTARTS, Place
from sftcore.cli.nodes import NodeWatch, interface_to, wait_for_first_node
from sftcore.errors import ConfigError

# a stop waits until a large checkpoint is written
_SECONDS_TO_SAVE = 1800
# what a process has to end by itself when another one failed, and once more when it is told to
_SECONDS_TO_FAIL = 5
_SECONDS_TO_JOIN = 900
# what the agent has to notice by itself that node 0 is lost
_SECONDS_TO_NOTICE = 5
_SECONDS_BETWEEN_STOPS = 1.0
_STOPS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
# what nodes tell each other, in the store of a start
_CAUSE, _HEARD = "sftcore/cause", "sftcore/heard"


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
        # torchrun reports each failure in a form of its own, with all the processes that it ended
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    with tempfile.TemporaryDirectory(prefix="sftcore-") as folder:
        failed_file = Path(folder) / "failed"
        _set_environment(place, failed_file)
        spec = _make_spec(place, words, max_restarts)
        logs = DefaultLogsSpecs(log_dir=folder)
        with Agent(spec, logs, place=place, failed_file=failed_file) as agent:
            return agent.run_to_end()


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


def _make_spec(place: Place, words: Sequence[str], max_restarts: int) -> WorkerSpec:
    if place.node:
        wait_for_first_node(place, _SECONDS_TO_JOIN)
    elif place.nodes > 1:
        print(
            f"node 0 of {place.nodes} waits for the others at {place.address}:{place.port}",
            file=sys.stderr,
        )
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
    return WorkerSpec(
        role="rank",
        local_world_size=place.processes,
        entrypoint=sys.executable,
        args=("-m", "sftcore.cli", *words),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.2,
        master_addr=place.address,
    )


class Agent(LocalElasticAgent):
    """Runs the processes of this node, and knows why they ended."""

    def __init__(
        self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, *, place: Place, failed_file: Path
    ) -> None:
        super().__init__(spec, logs_specs)
        self.place = place
        self.failed_file = failed_file
        self.watch = NodeWatch(place) if place.nodes > 1 else None
        # of this start: the processes that ended by themselves, causes before echoes, in the order in which they
        # were seen
        self.failures: list[Failure] = []
        self.lost_node: int | None = None
        self._starts = 0
        self._failed_at = 0.0
        self._stopped_at = 0.0
        self._stopped_by = 0
        self._previous: dict[int, Any] = {}
        self._is_over = False

    def __enter__(self) -> Agent:  # noqa: PYI034
        for number in _STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._stop)
        if hasattr(signal, "SIGUSR1"):
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._pass_on)
        if self.watch:
            self.watch.start()
        if self.place.node:
            threading.Thread(target=self._end_without_first, name="end", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.watch:
            self.watch.stop()

    def run_to_end(self) -> int:
        """Runs the processes, says why they ended, and returns the exit code of the run."""
        try:
            result = self.run()
            if self.lost_node != 0:
                self._part_from_others()
        except SignalException as stopped:
            return self._end_stopped(self._stopped_by or int(stopped.sigval))
        except RendezvousError as error:
            if not self.failures:
                return self._end_apart(str(error).splitlines()[0])
            result = RunResult(state=WorkerState.FAILED)
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
            self._stopped_at, self._stopped_by = now, number
            # the processes know SIGTERM and SIGINT; run() passes it on to them, and waits
            passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            raise SignalException(f"stopped by {number}", sigval=passed)
        # schedulers tell each process of a job, some more than once
        if now - self._stopped_at > _SECONDS_BETWEEN_STOPS:
            for process in self._processes().values():
                if process.poll() is None:
                    process.kill()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Hands SIGUSR1 to the processes that are far enough to take it, for it would end the others."""
        for process in self._processes().values():
            if process.poll() is None and _takes(process.pid, number):
                process.send_signal(number)

    def _end_stopped(self, number: int) -> int:
        """Says what the stop has led to."""
        found = self._ended()
        errors = [one for one in found if one.text and not one.is_stop and not one.is_echo]
        if errors:
            print(errors[0].describe(names_rank=True), file=sys.stderr)
            return errors[0].exit_code
        saved = [one.text for one in found if one.kind == "StoppedError"]
        name = signal.Signals(number).name
        print(saved[0] if saved else f"stopped by {name}; it was not saved", file=sys.stderr)
        return 128 + number

    # -- failures ------------------------------------------------------------------------------------------------

    def _processes(self) -> dict[int, Any]:
        """Returns each local rank with its process."""
        context = self._pcontext
        handlers = context.subprocess_handlers if isinstance(context, SubprocessContext) else {}
        return {rank: handler.proc for rank, handler in handlers.items()}

    def _ended(self) -> list[Failure]:
        """Returns why those processes ended that did not end well."""
        context = self._pcontext
        return [
            read_failure(
                ProcessFailure(
                    local_rank=place,
                    pid=process.pid,
                    exitcode=process.returncode,
                    error_file=context.error_files[place],
                ),
                self._worker_group.workers[place].global_rank,
            )
            for place, process in self._processes().items()
            if isinstance(context, SubprocessContext) and process.poll()
        ]

    def _note_failures(self) -> None:
        known = {failure.rank for failure in self.failures}
        fresh = [failure for failure in self._ended() if failure.rank not in known]
        if fresh and not self.failures:
            self._failed_at = time.monotonic()
        self.failures = sorted([*self.failures, *fresh], key=lambda failure: failure.is_echo)

    def _has_running(self) -> bool:
        return any(process.poll() is None for process in self._processes().values())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._note_failures()
        if self.failures:
            is_young = time.monotonic() - self._failed_at < _SECONDS_TO_FAIL
            if self._has_running() and is_young:
                # the others end by themselves, among them perhaps the one whose error matters
                return RunResult(state=WorkerState.HEALTHY)
            return self._give_up(WorkerState.FAILED)
        self.lost_node = self.watch.lost() if self.watch else None
        if self.lost_node is not None:
            return self._give_up(WorkerState.UNHEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            # one failed since the look above; the agent has ended the others, and knows it as the first
            order = {rank: place for place, rank in enumerate(result.failures)}
            self.failures = sorted(
                self._ended(), key=lambda one: (one.is_echo, order.get(one.rank, len(order)))
            )
            return self._give_up(WorkerState.FAILED)
        return result

    def _give_up(self, state: WorkerState) -> RunResult:
        """Ends the processes that are left, and keeps the run from starting anew where that is of no use."""
        self._shutdown()
        if self.place.nodes > 1 and self.failures:
            with contextlib.suppress(RuntimeError):  # the store of node 0 may be gone
                self._tell_nodes()
        if self.lost_node == 0 or any(failure.is_final for failure in self.failures):
            self._remaining_restarts = 0
        return RunResult(state=state)

    def _tell_nodes(self) -> None:
        """Tells the other nodes why the run ends, or learns it from them."""
        store: Any = self._store
        if not self.failures[0].is_echo:
            store.set(_CAUSE, self.failures[0].pack(self.place.node))
        else:
            store.wait([_CAUSE], datetime.timedelta(seconds=2 * _SECONDS_TO_FAIL))
            self.failures.insert(0, Failure.unpack(store.get(_CAUSE).decode()))
        store.set(f"{_HEARD}/{self.place.node}", "")

    def _end_without_first(self) -> None:
        """Ends this node where node 0 is lost and the agent does not: it may wait for an answer of its store for ever.

        All that it does is to look at the clock and at processes of its own.
        """
        assert self.watch is not None
        lost_since: float | None = None
        while lost_since is None or time.monotonic() - lost_since < _SECONDS_TO_NOTICE:
            time.sleep(0.5)
            if self._is_over:
                return
            if self.watch.lost() != 0:
                lost_since = None
            elif lost_since is None:
                lost_since = time.monotonic()
        self.lost_node, processes = 0, self._processes().values()
        self.failed_file.touch()
        for process in processes:
            process.terminate()
        self._wait_for_ends()
        for process in processes:
            if process.poll() is None:
                process.kill()
        print(self._cause(), file=sys.stderr, flush=True)
        shutil.rmtree(self.failed_file.parent, ignore_errors=True)
        os._exit(self.failures[0].exit_code if self.failures else 1)

    def _part_from_others(self) -> None:
        """Leaves the rendezvous, which tells other nodes that this one does not start anew."""
        if self.place.nodes > 1 and self.place.node == 0 and self.failures:
            # the store that tells them why ends with this process
            names = [f"{_HEARD}/{node}" for node in range(1, self.place.nodes)]
            store: Any = self._store
            with contextlib.suppress(RuntimeError):
                store.wait(names, datetime.timedelta(seconds=2 * _SECONDS_TO_FAIL))
        self._worker_group.spec.rdzv_handler.shutdown()

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, *_: object, **__: object
    ) -> None:
        # how long to wait is not for torch to say, whose versions differ in what they ask for
        seconds = _SECONDS_TO_SAVE
        is_failure = bool(self.failures) or self.lost_node is not None
        if not self._stopped_at or is_failure:
            if not is_failure:
                # another node left or starts anew, and the processes here are about to learn it
                self._wait_for_ends()
            self.failed_file.touch()
            seconds = _SECONDS_TO_FAIL
        if self._pcontext:
            self._pcontext.close(death_sig, seconds)

    def _wait_for_ends(self) -> None:
        begun = time.monotonic()
        while self._has_running() and time.monotonic() - begun < _SECONDS_TO_FAIL:
            time.sleep(0.1)
        self._note_failures()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.failures, self.lost_node = [], None
        self.failed_file.unlink(missing_ok=True)
        os.environ[RESTARTS] = str(self._starts)
        self._starts += 1
        if self.watch:
            self.watch.start_over()
        return dict(super()._start_workers(worker_group))

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        limit = worker_group.spec.max_restarts
        if self.failures or self.lost_node is not None:
            text = f"{self._cause()}\nstarting all processes anew ({limit - self._remaining_restarts} of {limit})"
        else:
            text = "a node starts anew, and all processes with it"
        print(text, file=sys.stderr)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._stop_workers(worker_group)
        self._pcontext = None

    def _cause(self) -> str:
        """Returns why the processes of this start ended, in words for people."""
        if self.failures:
            first = self.failures[0]
            # a wrong setting or row is found by every rank
            is_of_all = sum(failure.text == first.text for failure in self.failures) > 1
            is_alone = self._worker_group.workers[0].world_size == 1
            return first.describe(names_rank=not is_of_all and not is_alone and not first.is_echo)
        assert self.lost_node is not None
        seconds = f"{self.place.seconds:.0f} seconds"
        silence = (
            f"node {self.lost_node} was not heard of for {seconds}: it is down, or its line is"
        )
        if self.lost_node == 0:
            return (
                f"error: {silence}; as it keeps the nodes together, start all launchers again, with "
                "--resume_from_checkpoint last"
            )
        return f"error: {silence}; the last checkpoint is good (--resume_from_checkpoint last)"

    def _end_apart(self, reason: str) -> int:
        """Says why the nodes are not together."""
        if self.place.node:
            text = f"node 0 has ended or cannot be reached ({reason}); its last lines say why"
        elif self.lost_node is not None:
            text = f"node {self.lost_node} did not come back within {_SECONDS_TO_JOIN} seconds ({reason})"
        else:
            text = f"the nodes did not come together within {_SECONDS_TO_JOIN} seconds ({reason})"
        print(f"error: {text}", file=sys.stderr)
        return 1


def _takes(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, where the system tells."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
