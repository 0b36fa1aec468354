"""Whether a tokenizer fits the embedding of a model: an id without a row there ends a run with no word of why."""

from __future__ import annotations

from typing import Any

from sftcore.data import Encoder
from sftcore.errors import ConfigError


def check_vocabulary(encoder: Encoder, config: Any) -> str | None:
    """Returns a warning where rows may have tokens that the model does not know; None where all is right.

    Args:
        encoder: The tokenizer of the run.
        config: The configuration of the model.

    Raises:
        ConfigError: The tokens that pad a batch or end an answer are among them.
    """
    known: int = config.get_text_config().vocab_size
    if encoder.vocab_size <= known:
        return None
    found = f"the tokenizer of {encoder.folder} has {encoder.vocab_size:,} ids, and the model knows {known:,}"
    used = {
        "pads a batch": encoder.pad_token_id,
        "ends an answer": max(encoder.stop_token_ids, default=0),
    }
    for what, token_id in used.items():
        if token_id >= known:
            raise ConfigError(
                f"{found}: the token that {what} has the id {token_id:,}; expected tokenizer and weights of one model, "
                "or one whose embedding was resized and saved"
            )
    return f"warning: {found}: a row with a token from {known:,} on would end the run with an index error"
