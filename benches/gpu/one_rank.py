"""One process of a run, with the variables of torchrun: `one_rank.py SETTINGS FOUND`.

The first writes to FOUND its `losses`, the `group` of the processes, as `nccl, 1 process`, and whether torch's
`DistributedDataParallel` had the model (`is_wrapped`); or why the settings are `refused`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpu.measure import Exact, losses_of, run_quietly
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError

seen: dict[str, Any] = {"group": "none", "is_wrapped": False}


class Watch(Exact):
    """Looks at the group while the run has one."""

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        """Notes the group."""
        if dist.is_initialized():
            seen["group"] = f"{dist.get_backend()}, {dist.get_world_size()} process"
        super().on_train_begin(*arguments, **more)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Notes what the model was in."""
        seen["is_wrapped"] = any(
            isinstance(one, DistributedDataParallel) for one in gc.get_objects()
        )


def main() -> int:
    settings, out = map(Path, sys.argv[1:])
    found: dict[str, Any]
    try:
        result = run_quietly(TrainConfig(**json.loads(settings.read_text("utf-8"))), Watch)
        found = {"losses": losses_of(result), **seen}
    except ConfigError as error:
        found = {"refused": str(error)}
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
