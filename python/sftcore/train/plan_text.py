"""The plan of a dry run as text: a label, what it comes to, and pictures made of characters."""

from __future__ import annotations

from typing import Any

from sftcore.train.speed import clock

_GIB = 2**30
_LABEL = 12
_BAR = 40
_LEVELS = "▁▂▃▄▅▆▇█"


def describe_plan(plan: dict[str, Any]) -> str:
    """Returns the plan that `dry_run` made, in lines of at most 100 characters where names are not long."""
    parts = [
        ("model", _model(plan["model"])),
        ("trained", _trained(plan["model"])),
        ("data", _data(plan["data"])),
        ("lengths", _lengths(plan["batches"]["lengths"])),
        ("batches", _batches(plan["batches"], plan["steps"])),
        ("steps", _steps(plan["steps"])),
        ("rate", _rate(plan["learning_rate"])),
        ("memory", _memory(plan["memory"])),
        ("time", _time(plan["time"])),
        ("notes", plan["notes"]),
    ]
    lines = ["dry run: this is what the run would do; nothing was written"]
    for label, texts in parts:
        for number, text in enumerate(texts):
            lines.append(f"{label if number == 0 else '':<{_LABEL}}{text}".rstrip())
    return "\n".join(lines)


def _model(model: dict[str, Any]) -> list[str]:
    numbers = ""
    if model["parameters"]:
        share = model["trained_parameters"] / model["parameters"]
        numbers = (
            f": {model['parameters']:,} parameters in {model['dtype']}, {model['trained_parameters']:,} trained "
            f"({share:.2%})"
        )
    compute = (
        ""
        if model["compute_dtype"] == model["dtype"]
        else f", computing in {model['compute_dtype']}"
    )
    return [
        f"{model['name']}{numbers}",
        f"tuner {model['tuner']}, optimizer {model['optimizer']}, attention {model['attention']}{compute}",
    ]


def _trained(model: dict[str, Any]) -> list[str]:
    kinds = model["trained"]
    name, shape = (max((len(kind[key]) for kind in kinds), default=0) for key in ("name", "shape"))
    return [
        f"{kind['name']:<{name}}  {kind['modules']:>5,} x {kind['shape']:>{shape}}  {kind['parameters']:>15,} trained"
        for kind in kinds
    ]


def _data(data: dict[str, Any]) -> list[str]:
    held_out = (
        f"{data['eval_examples']:,} for evaluation" if data["eval_examples"] else "no evaluation"
    )
    if data["rows"] is None:
        return [f"a stream, counted as it comes; {held_out}"]
    lines = [
        f"{data['rows']:,} rows of {data['files']:,} files, {data['examples']:,} examples for training, {held_out}",
        f"{data['tokens_per_epoch']:,} tokens an epoch, {data['trained_tokens_per_epoch']:,} trained "
        f"({data['trained_share']:.1%})",
    ]
    lines += [f"{count:,} rows left out: {name}" for name, count in data["left_out"].items()]
    if len(data["sets"]) > 1:
        lines += [
            f"  {part['name']}: {part['examples']:,} examples, {part['trained_tokens']:,} trained tokens an epoch"
            for part in data["sets"]
        ]
    return lines


def _lengths(lengths: dict[str, Any] | None) -> list[str]:
    if lengths is None:
        return []
    top = max(lengths["counts"])
    width = len(f"{len(lengths['counts']) * lengths['bin']:,}")
    lines = [
        f"mean {lengths['mean']:,.0f} tokens, median {lengths['median']:,.0f}, 95 % below "
        f"{lengths['percentile_95']:,.0f}, longest {lengths['longest']:,}"
    ]
    for place, count in enumerate(lengths["counts"]):
        first, last = place * lengths["bin"] + 1, (place + 1) * lengths["bin"]
        bar = "█" * round(_BAR * count / top) or ("▏" if count else "")
        lines.append(f"{first:>{width},}-{last:<{width},}  {bar} {count:,}")
    return lines


def _batches(batches: dict[str, Any], steps: dict[str, Any]) -> list[str]:
    largest = batches["largest"]
    return [
        f"{steps['micro_batches_per_step']} micro-batches a step"
        + (f" on {steps['world_size']} ranks" if steps["world_size"] > 1 else "")
        + f", padding {batches['padding_share']:.1%}",
        f"largest {largest['rows']:,} x {largest['width']:,} tokens, in step {largest['step']:,} of the first epoch",
    ]


def _steps(steps: dict[str, Any]) -> list[str]:
    epochs = ""
    if steps["per_epoch"]:
        epochs = f" ({steps['per_epoch']:,} an epoch, {steps['epochs']:.3g} epochs)"
    return [
        f"{steps['total']:,}{epochs}: about {steps['tokens']:,} tokens, {steps['trained_tokens']:,} trained"
    ]


def _rate(rate: dict[str, Any]) -> list[str]:
    if rate["points"] is None:
        return [f"{rate['highest']:g}, then as {rate['schedule']} finds in what is measured"]
    warmup = f"rising over {rate['warmup_steps']:,} steps to " if rate["warmup_steps"] else "from "
    rates = [point["rate"] for point in rate["points"]]
    top = max(rates) or 1.0
    picture = "".join(_LEVELS[round(value / top * (len(_LEVELS) - 1))] for value in rates)
    return [
        f"{warmup}{rate['highest']:g}, {rate['schedule']}, {rate['last']:.2g} at the end  {picture}"
    ]


def _memory(memory: dict[str, Any]) -> list[str]:
    have = (
        f"{memory['free'] / _GIB:.1f} of {memory['total'] / _GIB:.1f} GiB free ({memory['device']})"
    )
    estimate = memory["estimate"]
    if estimate is None:
        return [have]

    def gib(name: str) -> str:
        return f"{estimate[name] / _GIB:.2f}"

    on = estimate["gradient_checkpointing"]
    other = "peak_without_checkpointing" if on else "peak_with_checkpointing"
    lines = [
        f"about {gib('peak')} GiB at the peak: weights {gib('weights')}, gradients {gib('gradients')}, optimizer "
        f"{gib('optimizer')},",
        f"kept activations {gib('activations')}, loss {gib('loss')}, the rest passing "
        f"({'without' if on else 'with'} gradient checkpointing {gib(other)} GiB)",
        have,
    ]
    if not estimate["fits"]:
        lines.append(
            "warning: more than is free; lower --per_device_train_batch_size or --max_length, or take "
            + ("--tuner_type lora" if on else "--gradient_checkpointing true")
        )
    return lines


def _time(found: dict[str, Any]) -> list[str]:
    if found["seconds"] is None:
        return ["unknown"]
    return [
        f"about {clock(found['seconds'])}, {found['seconds_per_step']:.3g} s a step, without evaluation and saving",
        found["how"],
    ]
