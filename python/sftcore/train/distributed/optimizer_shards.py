"""The optimizer of a run in one file a process, each with the rows that the process has of every state.

No process ever holds the whole, and files are read by the rows that are wanted, so that another number of processes
goes on from them. They hold tensors and nothing that could run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GROUPS_FILE = "optimizer_groups.pt"
_SHARDS = "optimizer-*-of-*.safetensors"


def save_shard(
    optimizer: torch.optim.Optimizer,
    folder: Path,
    shard: int,
    num_shards: int,
    local: Callable[[Tensor], Tensor],
) -> None:
    """Writes the file of one process.

    Args:
        optimizer: Whose state is parted by rows.
        folder: Of the checkpoint.
        shard: Which part this is, from 0.
        num_shards: How many parts are the whole.
        local: Returns the rows that this process has of a state.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"the state {name} of the optimizer is no tensor: {value!r}")
            tensors[f"{number}.{name}"] = local(value).detach().cpu().contiguous()
    save_file(tensors, folder / f"optimizer-{shard + 1:05d}-of-{num_shards:05d}.safetensors")
    if shard == 0:
        torch.save(state["param_groups"], folder / GROUPS_FILE)


def load_shards(
    optimizer: torch.optim.Optimizer,
    folder: Path,
    rows_of: Callable[[Tensor], tuple[int, int]],
    spread: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Gives an optimizer its part of what any number of processes wrote.

    Args:
        optimizer: With the parameters that it had then, each a part.
        folder: Of the checkpoint.
        rows_of: Returns the first and the last row, exclusive, that this process has of a parameter.
        spread: Returns the part of a state, given its parameter and these rows.

    Raises:
        ValueError: A file is missing, or the state is of other parameters.
    """
    paths = sorted(folder.glob(_SHARDS))
    wanted = int(paths[0].stem.rsplit("-", 1)[1]) if paths else 1
    if len(paths) != wanted:
        raise ValueError(f"{len(paths)} of {wanted} files {_SHARDS} are there")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for key in files[0].keys():  # noqa: SIM118  # it is no dict
            number, name = int(key.split(".", 1)[0]), key.split(".", 1)[1]
            if number >= len(parameters):
                raise ValueError(f"the optimizer has {len(parameters)} parameters, its state more")
            parameter = parameters[number]
            if not files[0].get_slice(key).get_shape():
                value = files[0].get_tensor(key)  # a counter, the same in all of them
            else:
                rows = sum(file.get_slice(key).get_shape()[0] for file in files)
                if rows != parameter.shape[0]:
                    raise ValueError(
                        f"the state of parameter {number} has {rows} rows, the parameter {parameter.shape[0]}"
                    )
                value = spread(parameter, _read_rows(files, key, *rows_of(parameter)))
            found.setdefault(number, {})[name] = value
    groups = torch.load(folder / GROUPS_FILE, weights_only=True)
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _read_rows(files: list[Any], key: str, start: int, stop: int) -> Tensor:
    parts: list[Tensor] = [files[0].get_tensor(key)[:0]]
    first = 0
    for file in files:
        rows = file.get_slice(key)
        length = rows.get_shape()[0]
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            parts.append(rows[low:high])
        first += length
    return torch.cat(parts)
