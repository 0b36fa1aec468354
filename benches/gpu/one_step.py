"""Where the time of one step goes: the heaviest kernels, the gaps between them, and the host."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.cases import Cases
from gpu.measure import WARM_UP, Exact, run_quietly, settings_of, wait
from gpu.shapes import make_rows, make_shape, on_gpu
from gpu.speed import LAYOUTS, SHORT
from sftcore.config import TrainConfig

_TOP = 15


class _Profiled(Exact):
    """Profiles the first step after those of warming up."""

    found: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == WARM_UP:
            wait()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
            _Profiled.found = profile(activities=activities)
            _Profiled.found.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_step_end(args, state, control, **more)
        if state.global_step == WARM_UP + 1 and _Profiled.found is not None:
            _Profiled.found.stop()


def gaps(intervals: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Returns how long some interval runs, how long none does between the first and the last, and the longest such gap.

    Args:
        intervals: Beginnings and ends, in any order; they may overlap.
    """
    busy = idle = longest = 0.0
    end: float | None = None
    for start, stop in sorted(intervals):
        if end is None or start > end:
            gap = 0.0 if end is None else start - end
            idle += gap
            longest = max(longest, gap)
            busy += stop - start
            end = stop
        elif stop > end:
            busy += stop - end
            end = stop
    return busy, idle, longest


def _profile(shape: Path, rows: Path, work: Path, **more: Any) -> dict[str, Any]:
    _Profiled.found = None
    given = settings_of(shape, rows, work, max_length=SHORT, max_steps=WARM_UP + 2, **more)
    run_quietly(TrainConfig(**given), _Profiled)
    found = _Profiled.found
    assert found is not None, "no step was profiled"
    events = found.events()
    assert events is not None
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in events
        # the names of spans are no kernels
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    of_host = [event for event in events if event.device_type == DeviceType.CPU]
    figures: dict[str, Any] = {
        "step_ms": (
            max(event.time_range.end for event in events)
            - min(event.time_range.start for event in events)
        )
        / 1e3,
        "host_ms": sum(event.self_cpu_time_total for event in of_host) / 1e3,
        "host_operations": len(of_host),
    }
    if kernels:
        busy, idle, longest = gaps(kernels)
        figures |= {
            "kernels": len(kernels),
            "kernel_ms": busy / 1e3,
            "gaps_ms": idle / 1e3,
            "longest_gap_ms": longest / 1e3,
        }
    order = "self_device_time_total" if kernels else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=_TOP, max_name_column_width=60)
    return figures | {"table": table}


def one_step(pack: Path, work: Path) -> int:
    """Profiles a step of LoRA on the 1B shape, padded and packed."""
    layouts = {name: LAYOUTS[name] for name in ("packed", "padded")}
    cases = Cases(work / "profile.json", [f"lora 1B, {SHORT} tokens, {name}" for name in layouts])
    shape = make_shape("1B", pack, work)
    rows = make_rows(pack, work / "profile.jsonl", max_length=SHORT, count=200)
    for name, more in layouts.items():
        cases.run(
            f"lora 1B, {SHORT} tokens, {name}",
            lambda more=more: _profile(shape, rows, work / "profile", **more),
        )
    return cases.exit_code()
