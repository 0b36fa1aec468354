"""What torch says when another process is gone, in words that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from sftcore.errors import PeerError
from sftcore.train.distributed.world import World

# of gloo, NCCL and the store, in lower case
_GONE = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "socket",
    "remote process exited",
    "aborted",
    "likely closed",
    "got 0 bytes",
)
# gloo names its source files
_BACKENDS = ("/gloo/", "Gloo", "NCCL")
_LATE = ("timed out", "timeout")


def is_of_peers(error: BaseException) -> bool:
    """Whether an error comes from talking to other processes, not from what this one does by itself."""
    text = str(error)
    is_of_backend = isinstance(error, RuntimeError) and any(name in text for name in _BACKENDS)
    return isinstance(error, dist.DistError) or is_of_backend


@contextlib.contextmanager
def explain_lost_peers(world: World) -> Iterator[None]:
    """Turns the errors of collective operations into one that says which rank noticed, and what.

    Raises:
        PeerError: Another process has ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not is_of_peers(error):
            raise
        text = str(error)
        low = text.lower()
        if any(word in low for word in _LATE):
            what = (
                "another process did not answer in time: it hangs, or is much slower; look at its last lines, or "
                "raise --ddp_timeout (seconds)"
            )
        elif any(word in low for word in _GONE):
            what = "another process of the run has ended; its error is the one to look at"
        else:
            raise
        raise PeerError(f"rank {world.rank}: {what} ({text.splitlines()[0]})") from error
