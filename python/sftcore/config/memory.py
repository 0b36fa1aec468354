"""What is traded for memory or speed, without a change of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sftcore.config.ranges import check_effects


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory and speed. What is traded for memory or speed, without a change of the result."""

    gradient_checkpointing: bool = True
    """Computes activations again in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_kind: Literal["full", "selective", "offload"] = "full"
    """full keeps the input of each layer alone; selective also the results of matrix products, so that only cheap
    operations run twice; offload keeps the inputs in the memory of the host."""
    activation_offload: bool = False
    """Keeps activations in the memory of the host between forward and backward pass; needs a GPU."""
    torch_compile: bool = False
    """Compiles the model; the first steps take a minute more, later ones are faster where shapes repeat."""
    tf32: bool | None = None
    """Lets an Ampere GPU multiply float32 matrices in TF32: faster, with 10 bits of mantissa; off where not given."""
    use_liger_kernel: bool = False
    """Takes the fused norms, rotary embeddings and MLP of the package liger-kernel; needs a GPU."""

    def _check_memory(self) -> None:
        kind = self.gradient_checkpointing, "--gradient_checkpointing true"
        check_effects(self, MemoryConfig, {"gradient_checkpointing_kind": kind})
