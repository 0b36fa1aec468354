"""The parts of a model that lie on the stages of a pipeline, to one that plain Transformers or PEFT loads.

Weights are written by the stage that has them, a file each, and rank 0 writes the index; an adapter is small, so rank 0
gathers it and writes one file. A weight that two stages share is written once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sftcore.train.distributed.stages import Parts

_ADAPTER_FILE = "adapter_model.safetensors"
# what Transformers writes and looks for
_METADATA = {"format": "pt"}


def join_weights(model: Any, parts: Parts, group: Any, folder: Path) -> None:
    """Writes the weights of all stages, each its own; every rank of the pipeline calls it.

    Args:
        model: The model of this stage.
        parts: Its modules.
        group: The ranks of the pipeline, in the order of their stages.
        folder: Of the checkpoint, which is there.
    """
    count = len(parts.split.layers)
    name = f"model-{parts.number + 1:05}-of-{count:05}.safetensors"
    twice = set()
    if parts.is_tied:
        twice = {f"{parts.head}.weight"}
        if not parts.is_first:
            twice.add(f"{parts.embedding}.weight")
    state = {
        key: value.detach().contiguous()
        for key, value in model.state_dict().items()
        if key not in twice
    }
    save_file(state, folder / name, metadata=_METADATA)
    size = sum(value.numel() * value.element_size() for value in state.values())
    found = _gather((name, sorted(state), size), group)
    if found is None:
        return
    # of a model without weights, as rank 0 saved it
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    index = {
        "metadata": {"total_size": sum(size for _, _, size in found)},
        "weight_map": {key: name for name, keys, _ in found for key in keys},
    }
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def join_adapter(model: Any, parts: Parts, group: Any, folder: Path) -> None:  # noqa: ARG001
    """Writes the adapter of all stages as one; every rank of the pipeline calls it.

    Args:
        model: The model of PEFT of this stage.
        parts: Its modules.
        group: The ranks of the pipeline, in the order of their stages.
        folder: Of the checkpoint, where rank 0 has saved the settings of the adapter.
    """
    own = {
        key: value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    found = _gather(own, group)
    if found is not None:
        state = {key: value for part in found for key, value in part.items()}
        save_file(state, folder / _ADAPTER_FILE, metadata=_METADATA)


def _gather(value: Any, group: Any) -> list[Any] | None:
    """Returns the values of all stages on the first one, and None on the others."""
    first = dist.get_global_rank(group, 0)
    held: list[Any] | None = None
    if dist.get_rank() == first:
        held = [None] * dist.get_world_size(group)
    dist.gather_object(value, held, dst=first, group=group)
    return held
