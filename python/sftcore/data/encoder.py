"""Rows to token ids and a loss mask."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sftcore import _core
from sftcore._core import Example
from sftcore.data.model_names import tokenizer_folder
from sftcore.errors import ConfigError, TemplateError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Row = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | bytes

Truncation = Literal["delete", "left", "right", "split", "raise"]
TEMPLATES = Path(__file__).parent.parent / "templates"

__all__ = ["Encoder", "Example", "Token", "load_template"]


def load_template(name: str) -> str | None:
    """Returns the Jinja source of a template, or None for `auto`.

    Args:
        name: `auto` (the model's own), the name of a packaged template, or the path of a `.jinja`
            file.

    Raises:
        ConfigError: There is no such template.
        FileNotFoundError: There is no such file.
    """
    if name == "auto":
        return None
    if name.endswith(".jinja"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such template file")
        return path.read_text(encoding="utf-8")
    path = TEMPLATES / f"{name}.jinja"
    if Path(name).name != name or not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise ConfigError(
            f'template "{name}" is unknown; expected auto, one of {known}, or the path of a .jinja file'
        )
    return path.read_text(encoding="utf-8")


class Token(NamedTuple):
    """One token of a row.

    Attributes:
        id: Its id.
        token: Its name in the vocabulary.
        text: What it stands for in the rendered text; of a part of a character, the whole one.
        span: First byte of that and one past the last, in the UTF-8 of the rendered text.
        weight: How much its loss counts; 0 is not trained.
        segment: The segment it begins in, by number.
        message: The message whose turn that is, by number, where it is a trained turn.
    """

    id: int
    token: str
    text: str
    span: tuple[int, int]
    weight: float
    segment: int | None
    message: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnEnd:
    """What closes a turn in one place.

    Attributes:
        text: What the model writes last, one or more tokens.
        token: The last of them, at which generation stops.
        is_token: Whether the tokenizer knows it; else it is written in pieces, and nothing stops there.
    """

    text: str
    token: str
    is_token: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnEnds:
    """What closes the turns of the assistant; None where nothing does, or the template refuses such a turn.

    Attributes:
        inner: An answer before the next question.
        last: The answer at the end of a chat.
        call: A call before the answer of the tool.
    """

    inner: TurnEnd | None = None
    last: TurnEnd | None = None
    call: TurnEnd | None = None

    @classmethod
    def read(cls, ends: Iterable[tuple[str, str, str, bool]]) -> TurnEnds:
        """Takes them as the core gives them."""
        return cls(
            **{
                place: TurnEnd(text=text, token=token, is_token=is_token)
                for place, text, token, is_token in ends
            }
        )

    @property
    def tokens(self) -> list[str]:
        """The tokens at which a tuned model stops, each once."""
        ends = [end.token for end in (self.inner, self.last, self.call) if end and end.is_token]
        return list(dict.fromkeys(ends))

    @property
    def warning(self) -> str | None:
        """What a model would not learn of stopping; None where every answer ends with a token."""
        remedy = (
            "the model is not taught to stop there; pass --append_eos true, or another --template"
        )
        for place, end in (("at the end of a chat", self.last), ("inside a chat", self.inner)):
            if end and not end.is_token:
                return (
                    f"answers {place} end with {end.token!r}, which this tokenizer cuts into pieces, so that nothing "
                    "stops there; pass --new_special_tokens template, or another --template"
                )
        if self.last is None and self.inner is None:
            return f"no answer ends with a token that stops generation: {remedy}"
        if self.last is None:
            return f"the answer at the end of a chat ends with no token that stops generation: {remedy}"
        if self.inner is None:
            return (
                "answers inside a chat end with no token that stops generation: only the last answer of a row "
                "teaches the model to stop"
            )
        return None


class Encoder:
    """Turns rows into examples with the tokenizer and chat template of a model folder.

    The text equals `apply_chat_template(tokenize=False)`, the ids equal those of the folder's
    `tokenizer.json`, and the mask is True on the tokens of assistant turns, each with the token that
    closes it.
    """

    def __init__(
        self,
        core: _core.Encoder,
        *,
        folder: Path,
        max_length: int,
        settings: dict[str, Any],
    ) -> None:
        self._core = core
        self.folder = folder
        """The model folder."""
        self.max_length = max_length
        """The longest example, in tokens."""
        self._settings = settings

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        template: str = "auto",
        max_length: int | None = None,
        truncation_strategy: Truncation = "delete",
        system: str | None = None,
        num_threads: int | None = None,
        tokenizer_engine: Literal["auto", "reference", "fast"] = "auto",
        train_on: str = "assistant",
        train_on_eos: Literal["turn", "last", "none"] = "turn",
        ignore_empty_think: bool = False,
        reasoning: Literal["keep", "drop"] = "keep",
        control_tokens_in_content: Literal["parse", "text"] = "parse",
        on_lost_content: Literal["warn", "raise", "skip"] = "warn",
        append_eos: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Encoder:
        """Reads the tokenizer of a model folder.

        Args:
            folder: Holds `tokenizer.json`, `tokenizer_config.json` and perhaps `chat_template.jinja`; or
                another name of a model: a run folder, a checkpoint, a `.gguf` file, a short name, a hub's id.
            template: `auto` (the folder's own), a packaged name, or the path of a `.jinja` file.
            max_length: The longest example in tokens; None sets no limit.
            truncation_strategy: What happens to longer rows: `delete` leaves them out and counts
                them, `left` and `right` cut that side and count them, `split` makes several examples of
                them (in a `BatchLoader`), `raise` is an error.
            system: A system message for conversations that have none.
            num_threads: Threads of `encode_batch`; None takes all cores.
            tokenizer_engine: `auto` takes the fast engine where it agrees with Hugging Face's
                `tokenizers` on a probe of this tokenizer, `reference` always the latter, `fast`
                the fast one or an error.
            train_on: `assistant`, `last` (what the assistant says after the last message of the
                user), `all` text, or roles with commas between.
            train_on_eos: Which turns train the token that closes them: every trained `turn`, the
                `last` one, or `none`.
            ignore_empty_think: Leaves `<think></think>` with nothing inside untrained.
            reasoning: `keep` leaves reasoning to the template, `drop` takes it out of the rows.
            control_tokens_in_content: Control tokens that stand in the content of a message are
                `parse`d, as Transformers does, or `text` like any other.
            on_lost_content: A row of which the chat template leaves out words, reasoning, calls or
                tools is trained on and counted (`warn`), an error (`raise`), or left out and counted (`skip`).
            append_eos: Adds the tokenizer's eos, trained, to a chat whose last answer no token ends.
            chat_template_kwargs: Arguments for the chat template; those of a row go before.

        Raises:
            FileNotFoundError: The folder or a file in it is missing.
            TokenizerError: The tokenizer cannot be read.
            TemplateError: The chat template does not compile.
            ConfigError: A setting is out of range.
        """
        path = tokenizer_folder(folder)
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length {max_length} is out of range: expected 2 or more")
        settings: dict[str, Any] = {
            "max_length": max_length or 2**31,
            "truncation_strategy": truncation_strategy,
            "system": system,
            "train_on": train_on,
            "train_on_eos": train_on_eos,
            "ignore_empty_think": ignore_empty_think,
            "reasoning": reasoning,
            "control_tokens_in_content": control_tokens_in_content,
            "on_lost_content": on_lost_content,
            "append_eos": append_eos,
            "chat_template_kwargs": json.dumps(chat_template_kwargs or {}, ensure_ascii=False),
        }
        core = _core.Encoder(
            path,
            template=load_template(template),
            num_threads=num_threads or available_cores(),
            tokenizer_engine=tokenizer_engine,
            **settings,
        )
        return cls(core, folder=path, max_length=max_length or 2**31, settings=settings)

    @classmethod
    def from_settings(cls, folder: Path, settings: Mapping[str, Any]) -> Encoder:
        """Opens an encoder again from its `settings` and a folder with the same tokenizer and template."""
        core = _core.Encoder(
            folder,
            template=None,
            num_threads=available_cores(),
            tokenizer_engine="auto",
            **{**_NEWER_SETTINGS, **settings},
        )
        return cls(core, folder=folder, max_length=settings["max_length"], settings=dict(settings))

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides ids and masks beside the tokenizer and the template."""
        return dict(self._settings)

    def with_template(self, template: str) -> Encoder:
        """Returns the same encoder with another chat template: a packaged name or a `.jinja` file.

        Raises:
            TemplateError: The chat template does not compile.
        """
        source = load_template(template)
        if source is None:
            raise ConfigError('with_template("auto") is what from_pretrained gives; pass a name')
        return Encoder(
            self._core.with_template(source),
            folder=self.folder,
            max_length=self.max_length,
            settings=self._settings,
        )

    def encode(self, row: Row) -> Example:
        """Encodes one row, a dict or JSON text in any of the known shapes.

        Raises:
            RowError: The row is wrong, or over `max_length` where that deletes or raises.
            TemplateError: The chat template refuses the row or is missing.
        """
        return self._core.encode(_to_json(row))

    def encode_batch(self, rows: Iterable[Row]) -> list[Example]:
        """Encodes rows in parallel; the same as `[encode(row) for row in rows]`."""
        return self._core.encode_batch([_to_json(row) for row in rows])

    def explain(self, row: Row) -> list[Token]:
        """Returns the tokens of a row with what each stands for and whether it is trained.

        Raises:
            RowError: The row is wrong. Its length is not checked.
            TemplateError: The chat template refuses the row or is missing.
        """
        text, tokens = self._core.explain(_to_json(row))
        encoded = text.encode()
        return [
            Token(
                id=token_id,
                token=name or "",
                text=encoded[start:end].decode(),
                span=(start, end),
                weight=weight,
                segment=segment,
                message=message,
            )
            for token_id, name, start, end, weight, segment, message in tokens
        ]

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders messages as `apply_chat_template(tokenize=False)` does."""
        return self._core.render(_to_json(messages), add_generation_prompt)

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Returns the ids of messages with the generation prompt, for inference. Shape `[tokens]`."""
        return self._core.tokenize(self.render(messages, add_generation_prompt=True), False)

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> NDArray[np.int64]:
        """Returns the ids of a text. Shape `[tokens]`."""
        return self._core.tokenize(text, add_special_tokens)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids."""
        return self._core.decode([int(token) for token in ids], skip_special_tokens)

    @property
    def chat_template(self) -> str:
        """The Jinja source in use.

        Raises:
            TemplateError: There is none.
        """
        source = self._core.chat_template
        if source is None:
            raise TemplateError(
                f"{self.folder}: the tokenizer has no chat template; pass --template default (for a base model), "
                "--template chatml or a .jinja file"
            )
        return source

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return self._core.chat_template is not None

    @property
    def tool_use_template(self) -> str | None:
        """The Jinja source for conversations with tools, where the folder names one of its own."""
        return self._core.tool_use_template

    @property
    def tokenizer_engine(self) -> str:
        """Which engine runs, `fast` or `reference`."""
        return self._core.tokenizer_engine

    @property
    def tokenizer_engine_reason(self) -> str | None:
        """Why the fast engine does not run, where `auto` asked for it."""
        return self._core.tokenizer_engine_reason

    @property
    def turn_end(self) -> str | None:
        """The token that closes an answer at the end of a chat, else inside it; None where the template writes none."""
        ends = self.turn_ends
        end = ends.last or ends.inner
        return end.token if end else None

    @property
    def turn_ends(self) -> TurnEnds:
        """What closes the turns of the assistant."""
        return TurnEnds.read(self._core.turn_ends)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the eos token."""
        return self._token_id("eos_token")

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows; it is masked by length, so it may equal eos."""
        pad = self._token_id("pad_token")
        return pad if pad is not None else (self.eos_token_id or 0)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: eos and the tokens that close turns, at the end of a chat, inside, after a call."""
        ends = [self._core.token_to_id(token) for token in self.turn_ends.tokens]
        return sorted({token for token in (self.eos_token_id, *ends) if token is not None})

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self._core.vocab_size

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides ids and mask: tokenizer, template, what ends turns, length, system."""
        parts = (
            _core.__version__,
            self._core.tokenizer_hash,
            self._core.chat_template,
            self._core.tool_use_template,
            self._core.turn_ends,
            *self._settings.items(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name in the vocabulary; None where it has none."""
        return self._core.token_to_id(token)

    def _token_id(self, name: str) -> int | None:
        token = self._core.special_token(name)
        return None if token is None else self._core.token_to_id(token)


# settings that a run of an older version did not write
_NEWER_SETTINGS: dict[str, Any] = {"on_lost_content": "warn", "append_eos": False}


def available_cores() -> int:
    """Returns the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _to_json(row: Row) -> bytes:
    if isinstance(row, bytes):
        return row
    if isinstance(row, str):
        return row.encode()
    return json.dumps(row, ensure_ascii=False).encode()
