"""One run at a time in a run folder.

Two runs that write into one folder would mix their checkpoints and logs. The first rank holds a lock of the operating
system on a file of the folder, which ends with the process, however that ends; who holds it stands in a file beside,
for the error that a second run gets before it writes anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.distributed.engine import Engine
from sftcore.train.loaders import say
from sftcore.train.resume import Resume, find_resume

_LOCK_FILE = ".lock"
_HOLDER_FILE = ".lock.json"


class RunLock:
    """Keeps other runs out of a run folder until it is closed."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    def find_resume(self, config: TrainConfig, engine: Engine) -> Resume | None:
        """Returns where a run goes on from, as `resume.find_resume` does, and holds the folder it goes on in.

        Raises:
            ConfigError: Another run holds the folder, or there is nothing to go on from.
        """
        output = Path(config.output_dir)
        if not config.add_version and (output / _LOCK_FILE).is_file():
            # before the folder is looked at, as a run that goes on changes it
            self.hold(output)
        found = find_resume(config, engine)
        if found is not None and found.run_folder is not None:
            self.hold(found.run_folder)
        return found

    def hold(self, folder: Path) -> None:
        """Holds a run folder; one that is held stays so.

        Raises:
            ConfigError: Another run holds it.
        """
        if self._lock is not None:
            return
        lock = FileLock(folder / _LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{folder} is in use by another run{_holder(folder)}; wait for its end or end it, or write elsewhere "
                "(another --output_dir, or --add_version true)"
            ) from error
        except (OSError, NotImplementedError) as error:
            say(
                f"warning: nothing keeps a second run out of {folder}, as its file system has no locks ({error})"
            )
            return
        self._folder, self._lock = folder, lock
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        (folder / _HOLDER_FILE).write_text(json.dumps(holder), encoding="utf-8")

    def close(self) -> None:
        """Lets go of the folder; the empty file stays, as removing it would let two runs in."""
        if self._lock is not None and self._folder is not None:
            (self._folder / _HOLDER_FILE).unlink(missing_ok=True)
            self._lock.release()


def _holder(folder: Path) -> str:
    """Returns who holds a folder, for people; nothing where it has not said so yet."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / _HOLDER_FILE).read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f" (process {found['pid']} on {found['host']}, since {since})"
    return ""
