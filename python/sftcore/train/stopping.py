"""Signals to a run that goes on: SIGTERM and Ctrl-C save and leave, SIGUSR1 saves and goes on.

The first signal lets the optimizer step under way end, saves a checkpoint and leaves with an error that
carries the exit code; the second ends the process at once, by the system's own default. An evaluation under
way is left, as it may take longer than the time that is given between SIGTERM and SIGKILL; the resumed run makes
up for it. A handler that the caller has installed stays, and so does a signal that is ignored. Under a launcher
it is the launcher that ends the run at the second signal, as some schedulers send the first to it and to each process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftcore.errors import StoppedError

_STOPS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_FAIL = 5
_HAS_LAUNCHER = "SFTCORE_LAUNCHER_PID" in os.environ


def _has_lost_a_peer() -> bool:
    """Whether the launcher ends this process because another one failed, not because it was told to stop."""
    failed_file = os.environ.get("SFTCORE_FAILED_FILE")
    return failed_file is not None and os.path.exists(failed_file)  # noqa: PTH110


def _tell(text: str) -> None:
    """Writes past the buffers, as a handler may strike in the middle of a print."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


class LeaveEvaluation(BaseException):
    """A signal came during an evaluation."""


class StopOnSignal(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Asks the Trainer to save and to stop when a signal has come; the last of the callbacks.

    Attributes:
        signal: The signal that stops the run, once it came and all processes know of it.
        evaluation_due: Whether it kept the evaluation of the step from being made.
    """

    def __init__(self, *, world_size: int) -> None:
        self.signal = 0
        self.evaluation_due = False
        self._is_save_asked = False
        # what came to this process, perhaps while the processes agree on what came before
        self._came = 0
        self._save_came = False
        self._is_evaluating = False
        self._world_size = world_size
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may install handlers
        for number in (*_STOPS, *self._saves()):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self._receive)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        return isinstance(error, LeaveEvaluation)

    @staticmethod
    def _saves() -> tuple[int, ...]:
        return () if sys.platform == "win32" else (signal.SIGUSR1,)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGTERM and _has_lost_a_peer():
            # the collective operation that this rank is in may never return
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_SECONDS_TO_FAIL)
            return
        if number not in _STOPS:
            self._save_came = True
            _tell(f"{name}: saving at the end of this step, then going on")
            return
        if self._came:
            return
        self._came = number
        for stop in () if _HAS_LAUNCHER else _STOPS:
            if stop in self._previous:
                signal.signal(stop, signal.SIG_DFL)
        _tell(f"{name}: saving at the end of this step, then leaving; once more leaves at once")
        if self._is_evaluating:
            raise LeaveEvaluation

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block that a signal leaves with `LeaveEvaluation`, where no other process waits for its end."""
        if self._world_size > 1:
            yield
            return
        self._is_evaluating = True
        try:
            if self._came:
                raise LeaveEvaluation
            yield
        finally:
            self._is_evaluating = False

    def leave_evaluation(self, control: TrainerControl) -> None:
        """Asks for a checkpoint and the end, with the evaluation still due."""
        self.signal = self._came
        control.should_evaluate = True
        self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        self.evaluation_due = control.should_evaluate
        control.should_evaluate = False
        control.should_save = True
        control.should_training_stop = True

    def _agree(self, args: TrainingArguments) -> None:
        """Makes all processes know of a signal that came to one, so that they stop at the same step."""
        stop, saves = self._came, self._save_came
        if saves:
            self._save_came = False
        if self._world_size > 1:
            asked = torch.tensor([stop, saves], device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            stop, saves = int(asked[0]), bool(asked[1])
        self.signal = self.signal or stop
        self._is_save_asked |= saves

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks for a checkpoint, and for the end."""
        self._agree(args)
        if self.signal:
            self._stop(control)
        elif self._is_save_asked:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ends the run where a signal came while it was saved, for it is saved now."""
        self._agree(args)
        self._is_save_asked = False
        if self.signal:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keeps a run that stops from evaluating."""
        if self.signal:
            control.should_evaluate = False

    def raise_if_stopped(self, checkpoint: str, step: int, max_steps: int) -> None:
        """Raises where a signal has come.

        Raises:
            StoppedError: It has; the run was saved as `checkpoint`.
        """
        if self.signal:
            name = signal.Signals(self.signal).name
            raise StoppedError(
                f"stopped by {name} after step {step} of {max_steps}, saved as {checkpoint}; go on with "
                "--resume_from_checkpoint last",
                signal=self.signal,
                checkpoint=checkpoint,
            )
