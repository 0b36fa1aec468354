"""The numbers of a run as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss, smoothed and as it was, and the evaluation loss over steps."""
    from matplotlib.figure import Figure  # a run that draws nothing does not load it

    train = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
    held_out = [
        (entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry
    ]
    if not train and not held_out:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training loss")
        smooth = [losses[0]]
        for loss in losses[1:]:
            smooth.append(0.8 * smooth[-1] + 0.2 * loss)
        axes.plot(steps, smooth, color="tab:blue", label="training loss, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="evaluation loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean loss of a trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
