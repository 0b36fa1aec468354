"""Chat templates to look at: which there are, and what one makes of a conversation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from sftcore import _core
from sftcore.data.encoder import TEMPLATES, Encoder, TurnEnds, load_template
from sftcore.data.show import SPECIAL_TOKENS, cut
from sftcore.errors import TemplateError

_SAMPLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateView:
    """A chat template and what it does.

    Attributes:
        source: The Jinja source.
        generation_prompt: What it adds for the model to answer; empty where it adds nothing.
        turn_ends: What closes a turn of the assistant.
        is_tagged: Whether `{% generation %}` tags say what is trained; else contents are followed.
        is_plain: Whether plain chats render by the compiled form; else Jinja renders all.
        jinja_triggers: What in a content sends the row to Jinja all the same.
        jinja_end_triggers: The same, for characters at the start or the end of a content.
        pieces: A sample conversation in order, each piece with whether it is trained.
    """

    source: str
    generation_prompt: str
    turn_ends: TurnEnds
    is_tagged: bool
    is_plain: bool
    jinja_triggers: list[str]
    jinja_end_triggers: list[str]
    pieces: list[tuple[str, bool]]


def list_templates() -> dict[str, str]:
    """Returns the names of the packaged templates, each with what it is for."""
    found = {}
    for path in sorted(TEMPLATES.glob("*.jinja")):
        comment = re.match(r"\{#-?(.*?)-?#\}", path.read_text(encoding="utf-8"), re.DOTALL)
        found[path.stem] = " ".join(comment[1].split()) if comment else ""
    return found


def view_template(name: str, *, model: str | Path | None = None) -> TemplateView:
    """Shows a template at work.

    Args:
        name: `auto` (that of `model`), a packaged name, or a `.jinja` file.
        model: A model folder, whose special tokens the template reads.

    Raises:
        ConfigError: There is no such template.
        TemplateError: It does not compile, refuses the sample, or cannot be followed.
    """
    encoder = Encoder.from_pretrained(model, template=name) if model is not None else None
    if encoder:
        template = encoder._core.template()
        source = encoder.chat_template
    else:
        source = load_template(name) or ""
        template = _core.Template(source, SPECIAL_TOKENS)
    try:
        text, segments = template.render_row(json.dumps(_SAMPLE).encode())
    except TemplateError:  # some have no place for a system message
        text, segments = template.render_row(json.dumps(_SAMPLE[1:]).encode())
    turn_ends = TurnEnds.read(template.turn_ends)
    is_plain, triggers, end_triggers = template.compiled_form()
    return TemplateView(
        source=source,
        generation_prompt=template.generation_prompt,
        turn_ends=turn_ends,
        is_tagged=template.is_tagged,
        is_plain=is_plain,
        jinja_triggers=triggers,
        jinja_end_triggers=end_triggers,
        pieces=cut(text, segments),
    )
