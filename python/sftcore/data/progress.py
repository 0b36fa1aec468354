"""How far the index is, for a person who waits."""

from __future__ import annotations

import sys
import time

# a shorter wait needs no word
_SILENCE = 1.0


class IndexProgress:
    """Prints bytes done, rate and time left: on one line of a terminal, elsewhere a line every ten seconds."""

    def __init__(self, what: str, *, is_shown: bool = True) -> None:
        self._what = what
        self._is_shown = is_shown
        self._is_terminal = sys.stderr.isatty()
        self._started: float | None = None
        self._last = 0.0
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        """Shows how far it is; called several times a second."""
        now = time.monotonic()
        if self._started is None:
            self._started = self._last = now
        elapsed = now - self._started
        is_done = total > 0 and done >= total
        pause = 0.2 if self._is_terminal else 10.0
        if not self._is_shown or elapsed < _SILENCE or (now - self._last < pause and not is_done):
            return
        if is_done and not self._width:
            return
        self._last = now
        left = (total - done) * elapsed / done if done else 0.0
        text = (
            f"indexing {self._what}: {done / max(total, 1):.0%} of {_size(total)}, "
            f"{_size(done / elapsed)}/s, {left:.0f} s left"
        )
        end = "" if self._is_terminal and not is_done else "\n"
        start = "\r" if self._is_terminal else ""
        sys.stderr.write(start + text.ljust(self._width) + end)
        sys.stderr.flush()
        self._width = 0 if is_done else len(text)


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1000
    return f"{number:.1f} TB"
