"""The loaders of a run, and what they say of its data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, Encoder, StreamLoader
from sftcore.data.progress import IndexProgress
from sftcore.train.datasets import find_sources
from sftcore.train.distributed.world import World


def open_loaders(
    config: TrainConfig, encoder: Encoder, world: World
) -> tuple[BatchLoader | StreamLoader, BatchLoader | None]:
    """Opens the data of a run for training and, where there is some, for evaluation.

    Raises:
        RowError: A row is wrong; it names file, line and column.
        ConfigError: A setting is out of range or has no effect.
        FileNotFoundError: A file is missing.
    """
    settings: dict[str, Any] = {
        "seed": config.seed if config.data_seed is None else config.data_seed,
        "rank": world.data_rank,
        "world_size": world.data_size,
        "num_threads": config.num_threads,
        "on_bad_row": config.on_bad_row,
        "max_bad_rows": config.max_bad_rows,
        "return_rows": True,
    }
    batching: dict[str, Any] = {
        "batch_size": config.per_device_train_batch_size,
        "tokens_per_batch": config.tokens_per_batch,
        "gradient_accumulation_steps": config.accumulation_steps(world.data_size),
        "mode": "pack" if config.packing else "bucket",
        "pack_length": config.packing_length,
        "padding_free": config.padding_free,
    }
    eval_batch_size = config.per_device_eval_batch_size or config.per_device_train_batch_size
    held_out = config.holds_out
    eval_loader = None
    if config.val_dataset:
        eval_loader = BatchLoader(
            find_sources(config.val_dataset, config),
            encoder,
            batch_size=eval_batch_size,
            mode="sequential",
            quarantine=_quarantine(config, "validation-"),
            hash_whole_files=config.hash_whole_files,
            progress=IndexProgress("evaluation data", is_shown=world.is_first),
            **settings,
        )
    if config.streaming:
        stream = StreamLoader(
            find_sources(config.dataset, config),
            encoder,
            shuffle_buffer_size=config.shuffle_buffer_size,
            mix=config.mix or None,
            stopping_strategy=config.stopping_strategy,
            quarantine=_quarantine(config, ""),
            **batching,
            **settings,
        )
        return stream, eval_loader
    train_loader = BatchLoader(
        find_sources(config.dataset, config),
        encoder,
        split="train" if held_out else "all",
        split_ratio=config.split_dataset_ratio if held_out else 0.0,
        mix=config.mix or None,
        mix_by=config.mix_by,
        stopping_strategy=config.stopping_strategy,
        dedup=config.dedup,
        validation=eval_loader,
        overlap=config.overlap,
        quarantine=_quarantine(config, ""),
        hash_whole_files=config.hash_whole_files,
        progress=IndexProgress("data", is_shown=world.is_first),
        **batching,
        **settings,
    )
    # a single row can only be trained
    if held_out and train_loader.report["examples"] > 1:
        eval_loader = train_loader.sibling(split="validation", batch_size=eval_batch_size)
    return train_loader, eval_loader


def _quarantine(config: TrainConfig, prefix: str) -> Path | None:
    if config.on_bad_row != "quarantine":
        return None
    path = Path(config.quarantine or Path(config.output_dir) / "quarantine.jsonl")
    return path.with_name(prefix + path.name)


def describe_data(train_loader: BatchLoader | StreamLoader, eval_loader: BatchLoader | None) -> str:
    """Returns what a user should know of the data before training, in lines."""
    if isinstance(train_loader, StreamLoader):
        held_out = (
            f"{eval_loader.num_rows:,} examples"
            if eval_loader
            else "no evaluation: pass --val_dataset"
        )
        names = ", ".join(part["name"] for part in train_loader.report["sets"])
        return f"data: a stream of {names}, counted as it comes; {held_out}"
    report = train_loader.report
    held_out = f", {eval_loader.num_rows:,} for evaluation" if eval_loader else ", no evaluation"
    tokens, trained = (
        sum(part[name] for part in report["epoch"]) for name in ("tokens", "trained_tokens")
    )
    lines = [
        f"data: {report['rows']:,} rows of {report['files']} files, {report['split_examples']:,} examples for "
        f"training{held_out}; {tokens:,} tokens an epoch, {trained / max(tokens, 1):.1%} trained; "
        f"longest {report['longest']:,}"
    ]
    if len(report["epoch"]) > 1:
        lines += [
            f"  {part['name']}: {part['examples']:,} examples an epoch, {part['trained_tokens']:,} trained tokens "
            f"({part['trained_tokens'] / max(trained, 1):.1%})"
            for part in report["epoch"]
        ]
    limit = train_loader.encoder.max_length
    warn = {
        "deleted": f"rows deleted, over max_length {limit} (the first: {report['first_deleted']})",
        "truncated": f"rows cut to max_length {limit} (the first: {report['first_truncated']})",
        "split": f"rows split at max_length {limit} (the first: {report['first_split']})",
        "untrained_pieces": "pieces of split rows left out, as they train nothing",
        "bad": "wrong rows left out:",
        "lossy": "rows left out, as the chat template leaves out some of what they say",
    }
    for name, text in warn.items():
        if report[name]:
            lines.append(f"warning: {report[name]:,} of {report['rows']:,} {text}")
        if name == "bad":
            lines += [f"  {count:,} x {reason}" for reason, count in report["bad_reasons"].items()]
            lines += [f"  at {text}" for text in report["first_bad"]]
    lines += [
        f"warning: the chat template leaves out {lost['kind']} in {lost['rows']:,} of {report['rows']:,} rows "
        f"(the first: {lost['first']}); --on_lost_content raise or skip refuses such rows"
        for lost in report["lost"]
    ]
    if report["tools_not_rendered"] and not report["lost"]:
        lines.append(
            f"warning: {report['tools_not_rendered']:,} of {report['rows']:,} rows carry tools that the chat "
            "template does not show the model"
        )
    for name, text in {
        "duplicates": "rows left out, equal to an earlier one",
        "near_duplicates": "rows left out, nearly equal to an earlier one",
        "not_drawn": "rows are not drawn, as #N asks",
    }.items():
        if report[name]:
            lines.append(f"  {report[name]:,} {text}")
    if report["overlap"]:
        path, line = train_loader.place(report["first_overlap"])
        fate = (
            "left out"
            if report["left_out"]
            else "trained all the same; --dedup exact leaves them out"
        )
        lines.append(
            f"warning: {report['overlap']:,} rows also stand in the evaluation data (the first: {path}:{line}), {fate}"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    if report["endless_turns"] and (warning := train_loader.encoder.turn_ends.warning):
        lines.append(
            f"warning: {report['endless_turns']:,} trained turns end with no token that stops generation (the first: "
            f"{report['first_endless']}): {warning}"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    """Prints once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)  # noqa: T201
