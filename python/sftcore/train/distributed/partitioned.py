"""A model whose parameters are spread over ranks (ZeRO-3), before DeepSpeed runs it.

A parameter is empty here until all ranks gather it. `gather_for_calls` does so for each layer while it is called, so
that such a model can be tried at the start; `load_weights` puts saved weights into it. All ranks must do the
same calls in the same order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sftcore.models.shapes import full_shape


def is_partitioned(parameter: Tensor) -> bool:
    """Whether a parameter is spread over ranks."""
    return hasattr(parameter, "ds_id")


def gather_for_calls(model: nn.Module) -> list[Any]:
    """Makes each module of a model gather its own parameters while it is called, without gradients.

    Returns:
        What undoes it, each with `remove`.
    """
    from deepspeed.runtime.zero import GatheredParameters  # not installed everywhere

    handles: list[Any] = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if is_partitioned(p)]
        if not own:
            continue
        open_contexts: list[Any] = []

        def enter(
            _module: nn.Module,
            _inputs: Any,
            own: list[nn.Parameter] = own,
            opened: list[Any] = open_contexts,
        ) -> None:
            context = GatheredParameters(own)
            context.__enter__()
            opened.append(context)

        def leave(
            _module: nn.Module, _inputs: Any, _output: Any, opened: list[Any] = open_contexts
        ) -> None:
            opened.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return handles


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the saved weights of a whole model into one that is spread over ranks.

    Args:
        model: The model.
        folder: With `model.safetensors`, perhaps in several files.

    Raises:
        ValueError: A weight is missing, or of another shape.
    """
    from deepspeed.runtime.zero import GatheredParameters

    files = _files_of(folder)
    parameters = dict(model.named_parameters())
    # a weight that is shared stands in the file under one of its names
    if missing := sorted(set(parameters) - set(files)):
        raise ValueError(f"{folder} has no {missing[0]}")
    for name, parameter in parameters.items():
        with safe_open(files[name], framework="pt") as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
            if shape != full_shape(parameter):
                raise ValueError(f"{name} is {shape} in {folder}; expected {full_shape(parameter)}")
            with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if torch.distributed.get_rank() == 0:
                    parameter.copy_(tensors.get_tensor(name))


def _files_of(folder: Path) -> dict[str, Path]:
    """Returns the file of each weight."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    path = folder / SAFE_WEIGHTS_NAME
    with safe_open(path, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), path)
