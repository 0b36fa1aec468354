"""Attention: which kernel is taken, and that examples in one row do not see each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sftcore.errors import ConfigError
from sftcore.models.attention import Device, choose_attention
from sftcore.train.inputs import InputKind, examples_of_tokens, model_inputs
from sftcore.train.probe import needs_mask, why_not_packed

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PACKAGES = frozenset({"flash_attn", "flash_attn_interface"})
AMPERE = Device(kind="cuda", capability=(8, 0), packages=PACKAGES)
HOPPER = Device(kind="cuda", capability=(9, 0), packages=PACKAGES)
TURING = Device(kind="cuda", capability=(7, 5), packages=PACKAGES)
BARE = Device(kind="cuda", capability=(9, 0), packages=frozenset())
CPU = Device(kind="cpu", capability=(0, 0), packages=frozenset())
CONFIG = transformers.LlamaConfig(**SIZES)
WIDE = transformers.LlamaConfig(**{**SIZES, "head_dim": 512})
CAPPED = transformers.Gemma2Config(**SIZES, head_dim=8)


@pytest.mark.parametrize(
    ("device", "config", "dtype", "name", "reason"),
    [
        (HOPPER, CONFIG, torch.bfloat16, "flash_attention_3", "fits device, dtype and head size"),
        (AMPERE, CONFIG, torch.bfloat16, "flash_attention_2", "fits device, dtype and head size"),
        (AMPERE, CONFIG, torch.float32, "sdpa", "bfloat16 or float16, not float32"),
        (AMPERE, WIDE, torch.bfloat16, "sdpa", "up to 256 dimensions, those of this model 512"),
        (TURING, CONFIG, torch.float16, "sdpa", "compute capability 8.0, found 7.5"),
        (BARE, CONFIG, torch.bfloat16, "sdpa", "the package flash-attn is not installed"),
        (CPU, CONFIG, torch.float32, "sdpa", "needs a CUDA device"),
        (CPU, CAPPED, torch.float32, "eager", "gemma2 has no code for it"),
    ],
)
def test_the_fastest_kernel_that_fits_is_taken_and_the_reason_said(
    device: Device, config: Any, dtype: Any, name: str, reason: str
) -> None:
    found = choose_attention("auto", config, dtype, training=True, device=device)
    assert found.name == name
    assert reason in found.reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "needs a CUDA device; --attn_impl auto takes what can"),
        ("flex_attention", "no backward pass on a CPU"),
        ("kernels-community/flash-attn", "run pip install kernels"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error_before_any_weight_is_loaded(
    name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_attention(name, CONFIG, torch.float32, training=True, device=CPU)


def tiny(config: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False
    return model.eval()


GOOD = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral, sliding": transformers.MistralConfig(**SIZES, sliding_window=8),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
    "qwen3 moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", GOOD)
def test_packed_examples_have_the_logits_that_they_have_alone(kind: str, attention: str) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("Transformers has no sdpa for gemma2")
    model = tiny(GOOD[kind], attention)
    assert why_not_packed(model, InputKind()) is None
    parts = [torch.randint(0, 211, (length,)) for length in (5, 11, 3)]
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    borders = torch.tensor([0, 5, 16, 19], dtype=torch.int32)
    ids = torch.cat(parts)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "cu_seqlens": borders}
    inputs = model_inputs(batch, InputKind())
    assert "attention_mask" not in inputs
    del inputs["labels"]
    with torch.no_grad():
        together = model(**inputs).logits[0]
        alone = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GptOssConfig(
            **SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
        ),
        transformers.Qwen3NextConfig(
            **SIZES,
            **LINEAR,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        transformers.Mamba2Config(
            vocab_size=211, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_mix_packed_examples_are_found_out(config: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    reason = why_not_packed(model, InputKind())
    assert reason is not None
    assert "changes the logits of the next" in reason or "differ from those" in reason


@pytest.mark.parametrize("kind", GOOD)
def test_padding_on_the_right_needs_no_mask_where_attention_is_causal(kind: str) -> None:
    assert not needs_mask(tiny(GOOD[kind], "eager"))


def test_flash_kernels_get_one_row_and_its_borders() -> None:
    batch = {
        "input_ids": torch.arange(12).reshape(2, 6),
        "labels": torch.arange(12).reshape(2, 6),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]),
        "cu_seqlens": torch.tensor([0, 3, 6, 11, 12], dtype=torch.int32),
    }
    inputs = model_inputs(batch, InputKind(is_flash=True))
    assert inputs["input_ids"].shape == (1, 12)
    assert inputs["max_length_q"] == 5
    assert inputs["cu_seq_lens_k"].tolist() == [0, 3, 6, 11, 12]
    assert inputs["cu_seq_lens_k"].dtype == torch.int32


def test_each_trained_token_is_found_in_its_example() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100], [-100, 8, 9, 4, -100, -100]])
    padded = {"labels": labels, "rows": torch.tensor([30, 40])}
    assert examples_of_tokens(padded).tolist() == [0, 0, 0, 1, 1, 1]
    # the second row ends in padding, which is a part of the borders but no example
    packed = {
        "labels": labels,
        "rows": torch.tensor([30, 31, 40]),
        "cu_seqlens": torch.tensor([0, 3, 6, 10, 12]),
    }
    assert examples_of_tokens(packed).tolist() == [0, 0, 1, 2, 2, 2]
    flat = {
        "labels": labels.reshape(1, -1),
        "rows": torch.tensor([30, 31, 40]),
        "cu_seqlens": torch.tensor([0, 3, 6, 12]),
    }
    assert examples_of_tokens(flat).tolist() == [0, 0, 1, 2, 2, 2]


def test_code_of_a_model_runs_only_when_asked_for(tmp_path: Path) -> None:
    from sftcore.models import load_settings

    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings = {"model_type": "own", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="pass --trust_remote_code true to run it"):
        load_settings(tmp_path)
    assert not ran.exists()
    assert load_settings(tmp_path, trust_remote_code=True).model_type == "own"
    assert ran.exists()
