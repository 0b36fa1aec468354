"""Small random models with experts, one of each architecture, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 6400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CHOSEN: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GROUPS: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**_SIZES, **_CHOSEN, head_dim=8, num_experts=4),
    "mixtral": transformers.MixtralConfig(
        **_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_next": transformers.Qwen3NextConfig(
        **_SIZES,
        **_CHOSEN,
        head_dim=8,
        num_experts=4,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4},
        **_CHOSEN,
        **_GROUPS,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "glm4_moe": transformers.Glm4MoeConfig(**_SIZES, **_CHOSEN, **_GROUPS, head_dim=8),
    "gpt_oss": transformers.GptOssConfig(
        **_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
}


def tiny_moe(kind: str) -> Any:
    """A random model whose experts matter: its weights are larger than those that training starts from."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_moe(kind: str, folder: Path, tokenizer: Path) -> Path:
    """Saves such a model with the small tokenizer of `tokenizer`."""
    tiny_moe(kind).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder
