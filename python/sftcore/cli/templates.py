"""`sftcore templates`: which chat templates there are, and what one does."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from sftcore.errors import ConfigError

if TYPE_CHECKING:
    from sftcore.data import TemplateView

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLE = """example:
  sftcore templates list
  sftcore templates show qwen3                a packaged template at work
  sftcore templates show --model DIR          the template of a model
  sftcore templates show my.jinja --source    with its Jinja source
"""


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "templates",
        help="list and show chat templates",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the packaged templates")
    listing.set_defaults(run=run_list)
    show = actions.add_parser(
        "show",
        help="a template at work on a sample conversation",
        description="Print a sample conversation as a template renders it. What is trained is green, or between «» "
        "without colour.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument(
        "name",
        nargs="?",
        default="auto",
        metavar="NAME",
        help="a packaged template or a .jinja file (default: that of --model)",
    )
    show.add_argument("--model", metavar="DIR", help="a model folder")
    show.add_argument("--source", action="store_true", help="print the Jinja source too")
    show.set_defaults(run=run_show)


def run_list(known: argparse.Namespace) -> None:  # noqa: ARG001
    """Runs `templates list`."""
    from sftcore.data import list_templates

    for name, purpose in list_templates().items():
        print(f"{name:<20}{purpose}")


def run_show(known: argparse.Namespace) -> None:
    """Runs `templates show`."""
    from sftcore.data import view_template

    if known.name == "auto" and known.model is None:
        raise ConfigError(
            "name a template, or a model with --model; sftcore templates list has the packaged ones"
        )
    view = view_template(known.name, model=known.model)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    opening, closing = ("\033[32m", "\033[0m") if colour else ("«", "»")
    if known.source:
        print(view.source)
        print("---")
    way = "by its {% generation %} tags" if view.is_tagged else "by following each content"
    print(f"generation prompt: {view.generation_prompt!r}")
    ends = view.turn_ends
    for place, end in (
        ("an answer at the end of a chat", ends.last),
        ("an answer inside a chat", ends.inner),
        ("a call", ends.call),
    ):
        if end is None and place == "a call" and "tool_calls" not in view.source:
            print("calls: the template does not render them")
            continue
        doubt = "" if end is None or end.is_token else " (no token of this tokenizer)"
        print(f"closes {place} with: {end.text + doubt if end else 'nothing'}")
    if ends.warning:
        print(f"warning: {ends.warning}")
    print(f"what is trained is found {way}")
    print(_describe_path(view))
    print("---")
    print(
        "".join(f"{opening}{text}{closing}" if trained else text for text, trained in view.pieces)
    )


def _describe_path(view: TemplateView) -> str:
    if not view.is_plain:
        return "renders by Jinja: what stands round a content does not follow from the roles alone"
    lines = [
        "renders plain chats by the compiled form; by Jinja, rows with tools, reasoning or other keys"
    ]
    if view.jinja_triggers:
        lines.append("  and contents with " + _in_short(view.jinja_triggers))
    if view.jinja_end_triggers:
        lines.append("  and contents that begin or end with " + _in_short(view.jinja_end_triggers))
    return "\n".join(lines)


def _in_short(texts: list[str], most: int = 8, longest: int = 24) -> str:
    shown = [repr(text if len(text) <= longest else text[: longest - 3] + "...") for text in texts]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
