"""Why a process of a run ended: from its exit code, and from the file in which it left its error."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a process ended.

    Attributes:
        rank: The process.
        code: Its exit code, or the negative number of the signal that ended it.
        kind: The class of its error; empty where it left none.
        text: What a user is to read of it; empty where it left nothing.
        is_final: Whether it would come again if all processes were started anew, or was asked for.
        node: The node that tells of it; None is this one.
    """

    rank: int
    code: int
    kind: str
    text: str
    is_final: bool
    node: int | None = None

    @property
    def exit_code(self) -> int:
        """What a command exits with, as a shell shows it."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def is_echo(self) -> bool:
        """Whether it is no more than that another process is gone."""
        return self.kind == "PeerError"

    @property
    def is_stop(self) -> bool:
        """Whether it was asked for."""
        return self.kind in ("StoppedError", "KeyboardInterrupt")

    def describe(self, *, names_rank: bool) -> str:
        """Returns a line for people, or the traceback of a bug."""
        place = "" if self.node is None else f"on node {self.node}: "
        if not self.text:
            return f"error: {place}{self._ending()}"
        head, mark, rest = self.text.partition("error: ")
        if not mark or head:
            return f"{place}{self.text}"
        return f"error: {place}rank {self.rank}: {rest}" if names_rank else f"error: {place}{rest}"

    def _ending(self) -> str:
        if self.code >= 0:
            return f"rank {self.rank} ended with exit code {self.code}"
        name = signal.Signals(-self.code).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"rank {self.rank} was killed by {name}{hint}"

    def pack(self, node: int) -> str:
        """Returns it in the form in which it is told to other nodes."""
        return json.dumps({**asdict(self), "node": node})

    @classmethod
    def unpack(cls, text: str) -> Failure:
        """Returns what another node told."""
        return cls(**json.loads(text))


def read_failure(found: ProcessFailure, rank: int) -> Failure:
    """Returns what a process left of its end."""
    message = found.error_file_data.get("message")
    extra = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return Failure(
        rank=rank,
        code=found.exitcode,
        kind=str(extra.get("kind", "")),
        text=str(extra.get("text", "")),
        is_final=bool(extra.get("is_final")),
    )
