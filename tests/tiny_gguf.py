"""A small random Llama as a `.gguf` file, written tensor by tensor, as converters write one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_gguf(path: Path, model: Any, tokenizer: Path, *, chat_template: str) -> Path:
    """Writes a Llama of Transformers whose head is its embedding, with the byte-level tokenizer of a folder."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8")))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(chat_template)
    weights = {name: value.numpy().astype(np.float32) for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _BLOCK.items():
            value = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                value = _paired(value, config.num_attention_heads)
            if theirs == "attn_k":
                value = _paired(value, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _paired(weight: Any, num_heads: int) -> Any:
    """The rows of each head in the order of the format: those that a rotation mixes side by side, not halves apart."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))


def _add_tokenizer(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    special = {token["id"] for token in values["added_tokens"] if token["special"]}
    ids = values["model"]["vocab"] | {
        token["content"]: token["id"] for token in values["added_tokens"]
    }
    tokens = sorted(ids, key=lambda token: ids[token])
    kinds = [
        gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        for number in range(len(tokens))
    ]
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
