"""A LoRA on an embedding whose weight is also that of the head: one pair of matrices, used in both places.

PEFT gives the head parameters of its own that share memory with those of the embedding, so that an optimizer
would move the same numbers twice. Here the head has none of its own; a saved adapter has both, as PEFT reads them.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from sftcore.tuners.exact import ADAPTER, ExactModel


class Transposed(nn.Module):
    """A linear layer without bias whose weight is the transpose of a parameter of another module."""

    def __init__(self, embedding: nn.Parameter) -> None:
        super().__init__()
        self.embedding = embedding

    @property
    def weight(self) -> Tensor:
        """The weight, `[out_features, in_features]`."""
        return self.embedding.t()

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the product, `[..., out_features]`."""
        return functional.linear(inputs, self.weight)


class TiedModel(ExactModel):
    """A LoRA on modules of which one is an embedding tied to the head."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = ADAPTER) -> None:
        super().__init__(model, peft_config, adapter_name)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        head.lora_A[ADAPTER] = Transposed(embedding.lora_embedding_B[ADAPTER])
        head.lora_B[ADAPTER] = Transposed(embedding.lora_embedding_A[ADAPTER])

    def converted(self, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Returns the adapter with a pair of matrices for the head too."""
        ending = f".{ADAPTER}.embedding"
        plain = {
            name.removesuffix("embedding") + "weight" if name.endswith(ending) else name: (
                value.t().contiguous() if name.endswith(ending) else value
            )
            for name, value in state.items()
        }
        return copy.deepcopy(self.peft_config[ADAPTER]), plain
