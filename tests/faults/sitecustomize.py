"""Makes one rank fail at the end of its third step: `FAULT=1:error` or `FAULT=1:bug`, with this folder on the path.

Python imports this file at its start, so the run is that of a user in all but the fault.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def fail(_: object, __: object, state: Any, *___: object, **____: object) -> None:
    from sftcore.errors import SftcoreError

    if state.global_step < 3:
        return
    if os.environ["FAULT"].endswith(":error"):
        raise SftcoreError("the fan of this device stands still")
    raise ZeroDivisionError("a bug on one rank")


class Break(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        del path, target
        if name != "sftcore.train.ledger":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        whole = spec.loader.exec_module

        def load(module: ModuleType) -> None:
            whole(module)
            module.WriteLedger.on_step_end = fail  # type: ignore[attr-defined]

        spec.loader.exec_module = load
        return spec


if os.environ.get("FAULT", "").startswith(f"{os.environ.get('RANK')}:"):
    sys.meta_path.insert(0, Break())
