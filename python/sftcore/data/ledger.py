"""What each optimizer step saw, as a chain of hashes.

The hash of a step is the sum of the hashes of its examples (ids, mask, weights), over all ranks, so it
does not depend on how the step was shared out; the chain joins it to all steps before. Two runs whose
ledgers are equal have seen the same examples in the same steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sftcore.errors import ConfigError

START = "0" * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One optimizer step.

    Attributes:
        epoch: Its epoch, from 0.
        step: Its number within the epoch, from 0.
        examples: The sum of the hashes of its examples, 16 hexadecimal digits.
        chain: The hash of it and of all steps before, 16 hexadecimal digits.
    """

    epoch: int
    step: int
    examples: str
    chain: str


def link(chain: str, step_hash: int) -> str:
    """Returns the chain with one more step."""
    data = bytes.fromhex(chain) + step_hash.to_bytes(8, "little")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def append_ledger(path: Path, entries: Iterable[LedgerEntry]) -> None:
    """Appends entries to a file, one a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)


def read_ledger(path: Path) -> list[LedgerEntry]:
    """Returns the entries of a file, the last one of each step.

    Raises:
        FileNotFoundError: There is none.
        ConfigError: A line is not an entry.
    """
    entries: dict[tuple[int, int], LedgerEntry] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = LedgerEntry(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}:{number}: not an entry of a ledger: {error}") from error
            # a run that went on from an earlier checkpoint writes some steps again
            entries[entry.epoch, entry.step] = entry
    return [entries[place] for place in sorted(entries)]
