"""How fast a run goes, and what its time and memory go into.

The batches of a rank pass through `watch` on their way to the Trainer, where their tokens and the time that they are
waited for are counted; the Trainer's callbacks say when steps end. Out come the numbers since the last log and those of
the whole run, over all ranks. Evaluation and saving count as time of the run, not of a step. Nothing here waits for the
device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Batch = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Counts:
    """What passed in some time.

    Attributes:
        steps: Optimizer steps.
        seconds: Their time, without evaluation and saving.
        wait: Seconds of these in which the next batch was waited for.
        slots: Places of the batches, padding included.
        tokens: Places that are no padding.
        trained_tokens: Labels that are predicted.
        examples: Examples.
    """

    steps: float = 0.0
    seconds: float = 0.0
    wait: float = 0.0
    slots: float = 0.0
    tokens: float = 0.0
    trained_tokens: float = 0.0
    examples: float = 0.0

    def add(self, other: Counts) -> None:
        """Adds what passed in another time."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def rates(self) -> dict[str, float]:
        """Returns the numbers of a log: rates a second, shares of 1, and seconds a step."""
        seconds = max(self.seconds, 1e-9)
        return {
            "tokens_per_second": self.tokens / seconds,
            "trained_tokens_per_second": self.trained_tokens / seconds,
            "padding_share": 1 - self.tokens / max(self.slots, 1.0),
            "data_wait_share": self.wait / seconds,
            "seconds_per_step": self.seconds / max(self.steps, 1.0),
        }


class MeasureSpeed(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Counts steps, tokens and seconds; the first of the callbacks."""

    def __init__(self, peak: Callable[[], float] | None = None) -> None:
        """Counts nothing yet.

        Args:
            peak: Returns the highest peak of memory of the ranks that have the same batches; every rank calls it.
        """
        self.peak = peak or peak_memory
        self.window = Counts()
        self.total = Counts()
        self.started = self.mark = time.perf_counter()
        # rows and widths of the micro-batches of the step under way
        self.shapes: list[tuple[int, int]] = []

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields `batches`, counting their tokens and the seconds that each is waited for."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.window.wait += time.perf_counter() - asked
            if batch is None:
                return
            self.window.add(count_tokens(batch))
            rows, width = batch["labels"].shape
            self.shapes.append((rows, width))
            yield batch

    def take(self, gather: Callable[[Tensor], Tensor], state: TrainerState) -> dict[str, float]:
        """Returns the numbers since the last log over all ranks, and begins anew.

        Args:
            gather: Joins a tensor of one value or more of every rank, on the Trainer's device.
            state: Where the run stands.
        """
        window, memory = self._over_ranks(gather, self.window)
        self.total.add(self.window)
        self.window = Counts()
        rates = window.rates()
        left = state.max_steps - state.global_step
        elapsed = time.perf_counter() - self.started
        # evaluations and checkpoints to come take what those so far took
        others = max(elapsed - self.total.seconds, 0.0) / max(self.total.steps, 1.0)
        eta = left * (rates["seconds_per_step"] + others)
        return {**rates, "memory_gib": memory / 2**30, "eta_seconds": eta}

    def summary(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the numbers of the whole run over all ranks, since it began or went on.

        `seconds` is all its time, `train_seconds` that of its steps, `memory_gib` the peak of the fullest rank.
        """
        self.total.add(self.window)
        self.window = Counts()
        total, memory = self._over_ranks(gather, self.total)
        return {
            "seconds": time.perf_counter() - self.started,
            "train_seconds": total.seconds,
            "num_tokens": total.tokens,
            "num_trained_tokens": total.trained_tokens,
            "num_examples": total.examples,
            **total.rates(),
            "memory_gib": memory / 2**30,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the clock."""
        self.started = self.mark = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts a step and its time."""
        now = time.perf_counter()
        self.window.steps += 1
        self.window.seconds += now - self.mark
        self.mark = now
        self.shapes.clear()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leaves the time of an evaluation out."""
        self.mark = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leaves the time of a checkpoint out."""
        self.mark = time.perf_counter()

    def _over_ranks(
        self, gather: Callable[[Tensor], Tensor], counts: Counts
    ) -> tuple[Counts, float]:
        """Returns the counts of all ranks and the highest peak of memory in bytes."""
        names = [field.name for field in fields(counts)]
        own = [*(getattr(counts, name) for name in names), float(self.peak())]
        table = gather(torch.tensor([own], dtype=torch.float64)).reshape(-1, len(own))
        sums = dict(zip(names, table.sum(dim=0).tolist(), strict=False))
        for name in ("steps", "seconds", "wait"):  # ranks go side by side
            sums[name] /= len(table)
        return Counts(**sums), float(table[:, -1].max())


def count_tokens(batch: Batch) -> Counts:
    """Counts the tokens of a batch of the loader.

    Args:
        batch: Tensors on the CPU, with `rows`.
    """
    labels = batch["labels"]
    return Counts(
        slots=labels.numel(),
        tokens=_real_tokens(batch),
        trained_tokens=int((labels[:, 1:] != -100).sum()),
        examples=len(batch["rows"]),
    )


def example_lengths(batch: Batch) -> list[int]:
    """Returns the tokens of each example of a batch, in the order of `rows`."""
    mask = batch.get("attention_mask")
    if mask is not None:
        lengths: list[int] = mask.sum(dim=1).tolist()
        return lengths[: len(batch["rows"])]
    borders, labels = batch["cu_seqlens"].tolist(), batch["labels"]
    flat, width = labels.reshape(-1), labels.shape[1]
    surplus = len(borders) - 1 - len(batch["rows"])
    lengths = []
    for start, end in pairwise(borders):
        # the padding at the end of a row has a part of its own, and trains nothing
        if surplus and end % width == 0 and bool((flat[start:end] == -100).all()):
            surplus -= 1
            continue
        lengths.append(end - start)
    return lengths


def _real_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum()) if len(batch["rows"]) else 0
    return sum(example_lengths(batch))


def peak_memory() -> int:
    """Returns the most memory that this process had so far, in bytes.

    On a GPU it is that of tensors on all its GPUs, elsewhere the resident memory of the process.
    """
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """Returns the most resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_speed(summary: dict[str, float]) -> str:
    """Returns what a run took, in a line."""
    return (
        f"trained for {clock(summary['train_seconds'])} of {clock(summary['seconds'])}: "
        f"{summary['num_tokens']:,.0f} tokens, {summary['num_trained_tokens']:,.0f} trained; "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['trained_tokens_per_second']:,.0f} trained; padding "
        f"{summary['padding_share']:.1%}, data wait {summary['data_wait_share']:.1%}; peak memory "
        f"{summary['memory_gib']:.2f} GiB"
    )


def clock(seconds: float) -> str:
    """Returns a time as people read it: `0:03:20`, or `2d 3:04:05`."""
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"
