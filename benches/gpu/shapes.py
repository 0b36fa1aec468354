"""The models and the rows of the GPU check, made on the spot, and the arithmetic that a token of them takes.

Weights are random: speed, memory and equality do not depend on what they are. Each has SmolLM2's vocabulary, whose
tokenizer comes along, so that heads are smaller than those of the models that the shapes are named after.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import AutoModelForCausalLM

_VOCABULARY = 49152
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
# of a token, at least in the mean of a turn, as arithmetic has many digits
_LETTERS = 2.25
# what the template puts before the first message
_SYSTEM_TOKENS = 32
# dense bfloat16, FLOP/s, as NVIDIA gives them
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def _llama(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16384,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": _llama(1024, 24, 16, 4608),
    "1B": _llama(2048, 16, 32, 8192, tie_word_embeddings=True),
    "8B": _llama(4096, 32, 32, 14336),
    "qwen3": _llama(1024, 28, 16, 3072, model_type="qwen3", head_dim=128, tie_word_embeddings=True),
    "gemma3": _llama(
        1152, 26, 4, 6912, model_type="gemma3_text", num_key_value_heads=1, head_dim=256
    ),
    "moe": _llama(
        1024,
        12,
        16,
        2048,
        model_type="qwen3_moe",
        head_dim=64,
        moe_intermediate_size=768,
        num_experts=16,
        num_experts_per_tok=4,
    ),
}
# in place of all of them where there is no GPU
_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24}


def on_gpu() -> bool:
    """Returns whether shapes are whole and times mean something."""
    return torch.cuda.is_available()


def make_shape(name: str, pack: Path, work: Path) -> Path:
    """Makes a folder with a configuration and a tokenizer, without weights, or tiny ones where there is no GPU.

    Args:
        name: One of `SHAPES`.
        pack: What `make gpu-pack` filled.
        work: The folder that the model's folder goes into.
    """
    folder = work / f"shape-{name}"
    if (folder / "config.json").is_file():
        return folder
    given = SHAPES[name] | {"vocab_size": _VOCABULARY, **_SPECIAL}
    if not on_gpu():
        given |= {
            name: value for name, value in _TINY.items() if name in given or name == "head_dim"
        }
    new = work / f"shape-{name}.new"
    shutil.copytree(pack / "data" / "tokenizers" / "smollm2", new, dirs_exist_ok=True)
    transformers.AutoConfig.for_model(**given).save_pretrained(new)
    new.rename(folder)
    return folder


def make_model(folder: Path, dtype: Any, attention: str | None = None) -> Any:
    """Makes a model of a configuration with random weights, on the GPU where there is one."""
    torch.manual_seed(0)
    settings = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("cuda" if on_gpu() else "cpu"):
        return AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention
        )


@contextmanager
def random_weights() -> Iterator[dict[str, Any]]:
    """A block in which models are made at random in place of being read: 16 GB need not be written first.

    Yields:
        `attention`, once a model is made: its kernel.
    """
    made: dict[str, Any] = {}

    def make(folder: Path, *, dtype: Any, attn_implementation: str | None = None, **_: Any) -> Any:
        model = make_model(Path(folder), dtype, attn_implementation)
        made["attention"] = model.config._attn_implementation
        return model

    with patch.object(AutoModelForCausalLM, "from_pretrained", make):
        yield made


def make_rows(pack: Path, path: Path, *, max_length: int, count: int) -> Path:
    """Writes chats of a sixteenth of `max_length` up to most of it, joined from real turns.

    Args:
        pack: What `make gpu-pack` filled.
        path: The file.
        max_length: In tokens, which no chat exceeds.
        count: Chats.
    """
    lines = (pack / "data" / "datasets" / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()
    most = int((max_length * 15 // 16 - _SYSTEM_TOKENS) * _LETTERS)
    turns = [(turn, _letters(turn)) for turn in map(json.loads, lines)]
    turns = [(turn, letters) for turn, letters in turns if letters <= most]
    draw = random.Random(max_length)
    place = 0
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            left = draw.randint(most // 16, most)
            messages: list[dict[str, str]] = []
            while True:
                turn, letters = turns[place % len(turns)]
                if messages and letters > left:
                    break
                place += 1
                left -= letters
                messages += [
                    {"role": "user", "content": turn["question"]},
                    {"role": "assistant", "content": turn["answer"]},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _letters(turn: dict[str, str]) -> int:
    # the tags of two messages are a dozen tokens
    return len(turn["question"]) + len(turn["answer"]) + int(12 * _LETTERS)


def flops_of(
    folder: Path, *, trains_all: bool, tokens: float, trained_tokens: float, mean_length: float
) -> float:
    """Returns the floating-point operations that steps need, without those of checkpointing.

    For a weight of a matrix and a token, forward and backward pass take 6 where the weight is trained and 4 where it
    is frozen; the weights of an adapter are too few to count. The head counts for trained
    tokens alone. Attention takes 6 x layers x heads x head size
    for each token before, the mean of which is half of `mean_length`, times two for keys and values.

    Args:
        folder: Of the model.
        trains_all: Whether all weights are trained.
        tokens: Without padding.
        trained_tokens: Those that have a label.
        mean_length: Tokens of the example of the mean token.
    """
    settings = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    of_experts = 0
    matrices = 0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "embed_tokens" in name or "lm_head" in name:
            continue
        if ".experts." in name:
            of_experts += weight.numel()
        else:
            matrices += weight.numel()
    if of_experts:
        matrices += of_experts * settings.num_experts_per_tok // settings.num_experts
    each = 6 if trains_all else 4
    width = settings.num_attention_heads * getattr(
        settings, "head_dim", settings.hidden_size // settings.num_attention_heads
    )
    attention = 6 * settings.num_hidden_layers * width * mean_length
    head = each * settings.hidden_size * settings.vocab_size
    return tokens * (each * matrices + attention) + trained_tokens * head


def peak_flops() -> float | None:
    """Returns the FLOP/s of dense bfloat16 products of this GPU; None where they are not known."""
    if not on_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
