"""The numbers of a run as pictures: one for each concern, and all of them on one page.

In comes the history of the Trainer; out go PNG files, each replaced in one move, so that a viewer never
sees half a picture. Only what was logged is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# distinct also for the colour-blind (Okabe and Ito 2008)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B", "#7F7F7F")
_GREY = "#555555"
_DPI = 120
_LOG_SCALE_FROM = 30  # the highest value over the lowest from which a logarithmic axis reads better
_SHOWN_SOURCES = 8
_OVERVIEW = "overview.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a picture.

    Attributes:
        label: Its name in the legend.
        steps: The optimizer steps of its points.
        values: Their values.
        held_out: Whether it is of an evaluation, which is drawn as points on a line.
    """

    label: str
    steps: list[int]
    values: list[float]
    held_out: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture.

    Attributes:
        name: Its file without `.png`.
        title: What it shows.
        unit: What its vertical axis counts.
        curves: Its lines.
        smoothed: Whether training values are noisy, so that their moving mean is drawn above them.
        log_scale: Whether the vertical axis is logarithmic where values span far.
        from_zero: Whether the vertical axis begins at 0.
    """

    name: str
    title: str
    unit: str
    curves: list[Curve]
    smoothed: bool = False
    log_scale: bool = False
    from_zero: bool = False


def draw_curves(history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws what a run logged.

    Args:
        history: The logs of the Trainer, with `step`.
        folder: Where the pictures go; it is made.

    Returns:
        The files, `overview.png` first; none where nothing was logged.

    Raises:
        OSError: A file cannot be written.
    """
    from matplotlib.figure import Figure  # a run that draws nothing does not load it

    panels = find_panels(history)
    if not panels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    columns = 1 if len(panels) == 1 else 2 if len(panels) < 5 else 3
    rows = -(-len(panels) // columns)
    page = Figure(figsize=(5.4 * columns, 3.5 * rows))
    _set_margins(page, rows, columns)
    for place, panel in enumerate(panels):
        _draw(page.add_subplot(rows, columns, place + 1), panel)
    files = [_save(page, folder / _OVERVIEW)]
    for panel in panels:
        figure = Figure(figsize=(8, 4.5))
        _set_margins(figure, 1, 1)
        _draw(figure.add_subplot(), panel)
        files.append(_save(figure, folder / f"{panel.name}.png"))
    return files


def _set_margins(figure: Figure, rows: int, columns: int) -> None:
    """Leaves room for titles, ticks and labels; measuring their texts would take as long as drawing them."""
    width, height = figure.get_size_inches()
    left, right, top, bottom = 0.75 / width, 1 - 0.2 / width, 1 - 0.45 / height, 0.6 / height
    # room between pictures, as a share of one of them
    beside = 0.9 / max((width * (right - left) - 0.9 * (columns - 1)) / columns, 0.1)
    above = 1.05 / max((height * (top - bottom) - 1.05 * (rows - 1)) / rows, 0.1)
    figure.subplots_adjust(left, bottom, right, top, wspace=beside, hspace=above)


def find_panels(history: Sequence[dict[str, Any]]) -> list[Panel]:
    """Returns the pictures that can be drawn of a history."""

    def of(key: str, label: str) -> list[Curve]:
        curve = _curve(history, key, label)
        return [curve] if curve else []

    panels = [
        Panel(
            name="loss",
            title="Loss",
            unit="mean loss of a trained token",
            curves=[*of("loss", "training"), *of("eval_loss", "evaluation")],
            smoothed=True,
            log_scale=True,
        ),
        Panel(
            name="token_acc",
            title="Token accuracy",
            unit="share of trained tokens",
            curves=[*of("token_acc", "training"), *of("eval_token_acc", "evaluation")],
            smoothed=True,
        ),
        Panel(
            name="learning_rate",
            title="Learning rate",
            unit="learning rate",
            curves=of("learning_rate", "learning rate"),
            from_zero=True,
        ),
        Panel(
            name="grad_norm",
            title="Gradient norm",
            unit="norm before clipping",
            curves=of("grad_norm", "gradient norm"),
            smoothed=True,
            log_scale=True,
        ),
        Panel(
            name="throughput",
            title="Throughput",
            unit="tokens a second",
            curves=[
                *of("tokens_per_second", "all tokens"),
                *of("trained_tokens_per_second", "trained tokens"),
            ],
            from_zero=True,
        ),
        Panel(
            name="overheads",
            title="Padding and data wait",
            unit="percent",
            curves=[
                *_percent(of("padding_share", "padding, of all places")),
                *_percent(of("data_wait_share", "data wait, of the time")),
            ],
            from_zero=True,
        ),
        Panel(
            name="memory",
            title="Peak memory",
            unit="GiB",
            curves=of("memory_gib", "peak so far"),
            from_zero=True,
        ),
        *_panels_of_sources(history),
        Panel(
            name="evaluation",
            title="Evaluation",
            unit="score",
            curves=[curve for key in _other_scores(history) for curve in of(key, key[5:])],
        ),
    ]
    return [panel for panel in panels if panel.curves]


def _panels_of_sources(history: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    for prefix, name, title in (
        ("loss/", "loss_by_source", "Training loss by data set"),
        ("eval_loss/", "eval_loss_by_source", "Evaluation loss by data set"),
    ):
        keys = sorted({key for entry in history for key in entry if key.startswith(prefix)})
        curves = [_curve(history, key, _shortened(key.removeprefix(prefix))) for key in keys]
        found = [curve for curve in curves if curve]
        if len(found) > _SHOWN_SOURCES:
            # those that were logged most often are the largest
            found = sorted(found, key=lambda curve: -len(curve.steps))[:_SHOWN_SOURCES]
            title += f" (the {_SHOWN_SOURCES} largest of {len(keys)})"
        yield Panel(
            name=name,
            title=title,
            unit="mean loss of a trained token",
            curves=found,
            smoothed=prefix == "loss/",
            log_scale=True,
        )


def _other_scores(history: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the metrics of evaluations between 0 and 1 that no other picture has."""
    others: dict[str, bool] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith("eval_") and not key.startswith(("eval_loss", "eval_token_acc")):
                is_score = isinstance(value, float | int) and 0 <= value <= 1
                others[key] = others.get(key, True) and is_score
    clocks = ("runtime", "per_second", "_time")
    return [key for key, is_score in others.items() if is_score and not key.endswith(clocks)]


def _curve(history: Sequence[dict[str, Any]], key: str, label: str) -> Curve | None:
    points = {
        int(entry["step"]): float(entry[key])
        for entry in history
        if isinstance(entry.get(key), float | int) and math.isfinite(entry[key])
    }
    if not points:
        return None
    return Curve(
        label=label,
        steps=list(points),
        values=list(points.values()),
        held_out=key.startswith("eval_"),
    )


def _percent(curves: list[Curve]) -> list[Curve]:
    return [
        Curve(label=curve.label, steps=curve.steps, values=[100 * value for value in curve.values])
        for curve in curves
    ]


def _shortened(name: str) -> str:
    name = name.rsplit("/", 1)[-1]
    return name if len(name) <= 28 else f"{name[:27]}…"


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Returns the exponential moving mean, in which a value weighs `weight` times the next one.

    The first values are not drawn towards 0: each mean is over the weights that there are so far.
    """
    means, total, weights = [], 0.0, 0.0
    for value in values:
        total = weight * total + value
        weights = weight * weights + 1
        means.append(total / weights)
    return means


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve, colour in zip(panel.curves, _COLOURS, strict=False):
        if curve.held_out:
            axes.plot(
                curve.steps, curve.values, "o-", ms=4, lw=1.5, color=colour, label=curve.label
            )
        elif panel.smoothed and len(curve.values) >= 10:
            is_alone = len([other for other in panel.curves if not other.held_out]) == 1
            axes.plot(curve.steps, curve.values, lw=0.8, alpha=0.3, color=colour)
            means = _smoothed(panel, curve.values)
            label = f"{curve.label}, smoothed" if is_alone else curve.label
            axes.plot(curve.steps, means, lw=1.8, color=colour, label=label)
        else:
            marker = "o" if len(curve.values) == 1 else None
            axes.plot(
                curve.steps, curve.values, lw=1.6, marker=marker, color=colour, label=curve.label
            )
    _scale(axes, panel)
    axes.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step", fontsize=9, color=_GREY)
    axes.set_ylabel(panel.unit, fontsize=9, color=_GREY)
    axes.tick_params(labelsize=8, colors=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.margins(x=0.02)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    if len(panel.curves) > 1 or panel.smoothed or panel.name == "evaluation":
        axes.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", loc="best")


def _smoothed(panel: Panel, values: Sequence[float]) -> list[float]:
    # over about a fortieth of the run
    weight = 1 - min(0.5, max(0.02, 40 / len(values)))
    if _is_logarithmic(panel):
        return [math.exp(mean) for mean in smooth([math.log(value) for value in values], weight)]
    return smooth(values, weight)


def _range(panel: Panel) -> tuple[float, float]:
    values = [value for curve in panel.curves for value in curve.values]
    return min(values), max(values)


def _is_logarithmic(panel: Panel) -> bool:
    low, high = _range(panel)
    return panel.log_scale and low > 0 and high / low >= _LOG_SCALE_FROM


def _scale(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = _range(panel)
    if _is_logarithmic(panel):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.yaxis.set_major_formatter(lambda value, _: _number(value))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    if panel.from_zero:
        axes.set_ylim(bottom=0, top=1.08 * high if high > 0 else 1)
    axes.yaxis.set_major_formatter(lambda value, _: _number(value))


def _number(value: float) -> str:
    """Returns a tick as people write it: 12,000, 0.25, 8e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return text.replace("e-0", "e-") if "e" in text else text


def _save(figure: Figure, path: Path) -> Path:
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=_DPI)
    part.replace(path)
    return path
