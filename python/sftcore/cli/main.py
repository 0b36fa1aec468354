"""Parses the command line, runs one command, and turns errors into exit codes.

0 is success, 1 a failure, 2 a usage error, 130 an interrupt. With SFTCORE_DEBUG=1 an error shows
its traceback.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from sftcore.cli import data, datasets, env, infer, launch, merge, plan, templates, train
from sftcore.cli.flags import read_more_flags
from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError, SftcoreError
from sftcore.program import run_program

_ALIASES = {"sft": "train", "merge-lora": "merge", "merge_lora": "merge"}


def run() -> NoReturn:
    """The program `sftcore`."""
    run_program(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `sftcore` and returns its exit code."""
    parser, commands = _parser()
    words = [_plain(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if words and words[0].startswith("--local_rank="):
        del words[0]  # launchers of old add it, and say it in the environment too
    if words and words[0] in _ALIASES:
        words[0] = _ALIASES[words[0]]
    known, unknown = parser.parse_known_args(words)
    known.command_words = words[1:]
    try:
        if unknown and "settings_class" in known:
            known.more_flags = read_more_flags(known.settings_class, unknown)
        elif unknown:
            command = commands[known.command]
            flags = [flag for action in command._actions for flag in action.option_strings]
            found = unknown[0].partition("=")[0]
            kind = "flag" if found.startswith("-") else "word"
            raise ConfigError(f"unknown {kind} {found}{did_you_mean(found, flags)}")  # noqa: TRY301
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        print(f"see sftcore {known.command} --help", file=sys.stderr)
        return 2
    try:
        known.run(known)
    except ConfigError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        # the reader, perhaps `head`, has seen enough; what is still buffered has no place to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SftcoreError, OSError) as error:
        return _fail(error, 1)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), 1)
    except KeyboardInterrupt as error:
        if launch.reports_to_launcher():
            launch.write_error(error, "")
        else:
            print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not launch.reports_to_launcher():
            raise
        launch.write_error(error, f"rank {os.environ['RANK']}:\n{traceback.format_exc()}")
        return 1
    return 0


def _missing(error: ModuleNotFoundError) -> Exception:
    """Returns what to do where only the data side is installed; the error itself where a module of ours is missing."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "sftcore"):
        raise error
    return SftcoreError(
        f'this command needs the package {package}, which is not installed; run pip install "sftcore[train]"'
    )


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("SFTCORE_DEBUG"):
        raise error
    rank = os.environ.get("RANK", "0")
    place = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if launch.reports_to_launcher():
        # all ranks find the same fault in a setting or a row, and one of them is shown
        launch.write_error(error, f"error: {error}")
    else:
        print(f"error: {place}{error}", file=sys.stderr)
    return code


def _plain(word: str) -> str:
    """Writes a flag or command with underscores, whichever dashes it was typed with."""
    if not word.startswith("--"):
        return word
    name, mark, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + mark + value


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="sftcore",
        description="Fine-tune language models on instruction data: exact, seen, fast.",
        epilog="start with: sftcore train --model smollm2-135m --dataset my.jsonl",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"sftcore {importlib.metadata.version('sftcore')}"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, plan, infer, merge, data, datasets, templates, env):
        command.register(subparsers)
    return parser, dict(subparsers.choices)
