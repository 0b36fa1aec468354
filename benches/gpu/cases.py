"""The cases of a part: each is noted as soon as it ends, and one that fails leaves the others to run.

All cases are named before the first one runs, so that what a part did not come to is known by name.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu.runner import NOT_REACHED, SKIPPED, write_whole


class Skip(Exception):  # noqa: N818
    """A case has nothing to do on this machine; the message says why."""


class Refusal(Exception):  # noqa: N818
    """What a case asks for is refused, as it should be; the message is that of the refusal."""


class Cases:
    """What a part finds, by name.

    A case has a `status`: `passed`, `failed` (with `error`), `skipped` or `refused` (with `reason`), or `not reached`.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        """Names all cases.

        Args:
            path: The file that they are written to.
            names: In the order in which they will run.
        """
        self._path = path
        self.found: dict[str, dict[str, Any]] = {name: {"status": NOT_REACHED} for name in names}
        self._write()

    def _write(self) -> None:
        write_whole(self._path, self.found)

    def note(self, name: str, status: str, **more: Any) -> None:
        """Notes how a case ended."""
        self.found[name] = {"status": status, **more}
        self._write()

    def run(self, name: str, call: Callable[[], dict[str, Any]]) -> None:
        """Runs a case and notes what it returns, or how it failed."""
        begun = time.monotonic()
        try:
            found = call()
        except Skip as reason:
            self.note(name, "skipped", reason=str(reason))
        except Refusal as reason:
            self.note(name, "refused", reason=str(reason))
        except Exception as error:
            # the whole of it is in the log of the part
            traceback.print_exc()
            self.note(name, "failed", error=f"{type(error).__name__}: {error}"[:2000])
        else:
            self.note(name, "passed", **found, case_seconds=round(time.monotonic() - begun, 2))

    def exit_code(self) -> int:
        """Returns that of the part: 1 where a case failed, `SKIPPED` where none ran."""
        statuses = {case["status"] for case in self.found.values()}
        if "failed" in statuses:
            failed = [name for name, case in self.found.items() if case["status"] == "failed"]
            print(f"failed: {', '.join(failed)}")
            return 1
        if statuses <= {"skipped"}:
            print("; ".join(f"{name}: {case['reason']}" for name, case in self.found.items())[:600])
            return SKIPPED
        return 0
