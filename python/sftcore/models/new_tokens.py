"""Tokens that a tokenizer does not have yet: added to it, and given rows in the embedding and the head of a model.

In come a tokenizer and names, out come a folder with the same tokenizer and these tokens, from which an `Encoder` is
opened, and a model whose new rows are the mean of those that it had. Both are the same on every process and at every
start, so that a run that goes on, inference and merging begin from the model that training began from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import nn

from sftcore.data import Encoder
from sftcore.data.control_tokens import control_tokens, is_known
from sftcore.data.run import save_tokenizer
from sftcore.errors import ConfigError
from sftcore.models.shapes import full_shape
from sftcore.models.stops import copy_stops

NEW_TOKENS_FILE = "new_tokens.json"
FROM_TEMPLATE = "template"
_MULTIPLE = 64
"""Rows of an embedding that is made longer, as matrix products of a GPU like them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokens:
    """What was added to a tokenizer.

    Attributes:
        ids: Each token by its name to its id.
        num_known: The ids that the tokenizer had before: all below this number.
    """

    ids: dict[str, int]
    num_known: int

    @property
    def rows(self) -> list[int]:
        """The rows of the embedding that are trained, in order."""
        return sorted(self.ids.values())


def names_to_add(encoder: Encoder, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the names of the tokens that a tokenizer lacks, and of those asked for that it has.

    Args:
        encoder: The tokenizer and its chat template.
        asked: Names, or `template` for the control tokens of the chat template.
    """
    named = [name for name in asked if name != FROM_TEMPLATE]
    if FROM_TEMPLATE in asked:
        written = control_tokens(encoder)
        named += [name for name in written if name not in named and not is_known(encoder, name)]
    known = [name for name in named if is_known(encoder, name)]
    return [name for name in named if name not in known], known


def add_tokens(encoder: Encoder, names: Sequence[str], folder: Path) -> NewTokens:
    """Writes the tokenizer of an encoder with more special tokens.

    Args:
        encoder: The tokenizer as it is, with the chat template that goes with it.
        names: The tokens, none of which it knows.
        folder: Where it goes, with what else an encoder reads of a model.
    """
    save_tokenizer(encoder, folder)
    copy_stops(encoder.folder, folder)
    tokenizer = Tokenizer.from_file(str(encoder.folder / "tokenizer.json"))
    num_known = 1 + max(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary[name] for name in names}
    _add_to_settings(folder / "tokenizer_config.json", ids)
    return NewTokens(ids=ids, num_known=num_known)


def _add_to_settings(path: Path, ids: dict[str, int]) -> None:
    """Names the tokens in `tokenizer_config.json`, where older versions of Transformers look for them."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    by_id = settings.get("added_tokens_decoder")
    if isinstance(by_id, dict):
        plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for name, token_id in ids.items():
            by_id[str(token_id)] = {"content": name, **plain, "special": True}
    key = "additional_special_tokens"
    if isinstance(settings.get("extra_special_tokens"), list):
        key = "extra_special_tokens"
    settings[key] = [*(settings.get(key) or []), *ids]
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def extend_embedding(model: Any, new: NewTokens) -> None:
    """Gives a model rows for new tokens, in place: as the mean of the rows that its tokenizer had.

    Rows that pad an embedding are taken where there are enough; else it grows to a multiple of 64 rows.

    Args:
        model: A causal language model of Transformers, as it was loaded.
        new: The tokens.

    Raises:
        ConfigError: The model has no embedding of its own.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"--new_special_tokens cannot be used with {type(model).__name__}, whose embedding is a "
            f"{type(embedding).__name__}"
        )
    before = full_shape(embedding.weight)[0]
    needed = new.rows[-1] + 1
    if needed > before:
        model.resize_token_embeddings(needed, pad_to_multiple_of=_MULTIPLE, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        weights.append(head.weight)
    if getattr(head, "bias", None) is not None:
        weights.append(head.bias)
    known = min(before, new.num_known)
    for weight in weights:
        size = full_shape(weight)[0]
        fresh = [row for row in new.rows if known <= row < before] + list(range(before, size))
        with torch.no_grad():
            weight[fresh] = weight[:known].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def write_new_tokens(folder: Path, new: NewTokens) -> None:
    """Writes `new_tokens.json` beside an adapter, for those who load its base model."""
    text = json.dumps(asdict(new), ensure_ascii=False, indent=2)
    (folder / NEW_TOKENS_FILE).write_text(text, encoding="utf-8")


def read_new_tokens(adapters: Path) -> NewTokens | None:
    """Returns the tokens that the base model of an adapter lacks; None where it lacks none.

    Raises:
        ConfigError: The file is damaged.
    """
    path = adapters / NEW_TOKENS_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return NewTokens(
            ids={str(name): int(token_id) for name, token_id in values["ids"].items()},
            num_known=int(values["num_known"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}; copy the checkpoint again") from error
