"""The encoder of a run: the tokenizer of the model, with the tokens that `--new_special_tokens` adds to it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sftcore.config import TrainConfig
from sftcore.data import Encoder
from sftcore.data.control_tokens import unknown_tokens_warning
from sftcore.models.new_tokens import FROM_TEMPLATE, NewTokens, add_tokens, names_to_add
from sftcore.train.loaders import say


@contextlib.contextmanager
def open_encoder(config: TrainConfig, folder: Path) -> Iterator[tuple[Encoder, NewTokens | None]]:
    """Opens the encoder that the settings ask for, and says what is to be known of it.

    Each process writes a tokenizer with new tokens into a folder of its own, which is there as long as the block runs;
    run folder and checkpoints carry it.

    Args:
        config: The settings of the run.
        folder: The model.

    Yields:
        The encoder, and what was added to the tokenizer; None where nothing was.

    Raises:
        SftcoreError: The tokenizer or the template is wrong.
    """
    encoder = _open(config, folder, config.template)
    if encoder.tokenizer_engine_reason:
        say(f"tokenizer: the reference engine, as {encoder.tokenizer_engine_reason}")
    asked = config.new_special_tokens
    names, known = names_to_add(encoder, asked) if asked else ([], [])
    if known:
        say(
            f"note: the tokenizer has {', '.join(known)} already; --new_special_tokens adds nothing there"
        )
    if asked and not names:
        of_template = FROM_TEMPLATE in asked
        what = "that the chat template writes" if of_template else "that it names"
        say(
            f"warning: --new_special_tokens has no effect: the tokenizer knows all control tokens {what}"
        )
    if not names:
        _warn(encoder)
        yield encoder, None
        return
    with tempfile.TemporaryDirectory(prefix="sftcore-tokenizer-") as scratch:
        new = add_tokens(encoder, names, Path(scratch))
        longer = _open(config, Path(scratch), "auto")
        shown = ", ".join(f"{name} ({token_id})" for name, token_id in new.ids.items())
        say(f"new tokens: {shown}; their rows start at the mean of the other {new.num_known:,}")
        _warn(longer)
        yield longer, new


def _warn(encoder: Encoder) -> None:
    if warning := unknown_tokens_warning(encoder):
        say(warning)


def _open(config: TrainConfig, folder: Path, template: str) -> Encoder:
    return Encoder.from_pretrained(
        folder,
        template=template,
        max_length=config.max_length,
        truncation_strategy=config.truncation_strategy,
        system=config.system,
        tokenizer_engine=config.tokenizer_engine,
        train_on=config.train_on,
        train_on_eos=config.train_on_eos,
        ignore_empty_think=config.ignore_empty_think,
        reasoning=config.reasoning,
        control_tokens_in_content=config.control_tokens_in_content,
        on_lost_content=config.on_lost_content,
        append_eos=config.append_eos,
        chat_template_kwargs=config.template_arguments,
    )
