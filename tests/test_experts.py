"""Models with experts: what all-linear trains of them, that it learns, and that merged equals unmerged."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from experts import CONFIGS, make_moe, tiny_moe
from sftcore.config import MergeConfig, TrainConfig
from sftcore.errors import ConfigError
from sftcore.export import merge
from sftcore.train import train
from sftcore.train.open import padded
from sftcore.tuners import (
    apply_tuner,
    count_parameters,
    coverage,
    describe_parameters,
    notes_on_targets,
)
from sftcore.tuners.coverage import weights_of
from sftcore.tuners.experts import fused_experts
from tiny_runs import make_rows
from training import config_of, losses
from tuned import logits_of

LEFT_OUT = {"gate", "router", "conv1d"}
IDS = torch.arange(100, 148)[None]


def settings_of(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "dataset": ["d"], "lora_dropout": 0.0, **settings})


def randomised(model: Any) -> Any:
    """Gives every matrix of an adapter numbers, as B starts at 0."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_linear_reaches_every_matrix_but_routers_and_convolutions(kind: str) -> None:
    model = apply_tuner(tiny_moe(kind), settings_of())
    found = coverage(model)
    assert set(found.left_out) <= LEFT_OUT
    assert found.share > 0.97
    weights = weights_of(model)
    assert sum(weight.trained for weight in weights) == count_parameters(model)[1]
    experts = [weight for weight in weights if len(weight.shape) == 3 and weight.kind != "conv1d"]
    assert experts
    for weight in experts:
        # a pair of matrices for each expert, whichever way its weights lie
        assert weight.trained == weight.shape[0] * 8 * sum(weight.shape[1:])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_matrices_of_an_expert_change_that_expert_alone(kind: str) -> None:
    model = apply_tuner(tiny_moe(kind), settings_of(lora_rank=2))
    for module in model.modules():
        if getattr(module, "parameter_name", "weight") == "weight":
            continue
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            down.normal_()
            up.zero_()
            up.view(up.shape[0], 2, module.num_experts)[:, :, 1].normal_()
        delta = module.get_delta_weight("default")
        assert delta.shape == module.get_param().shape
        assert delta[1].abs().max() > 0
        assert not delta[[0, 2, 3]].any()
        assert int(torch.linalg.matrix_rank(delta[1])) == 2
        # A reads what the expert reads: a product of its inputs with the update factors through A
        of_one = delta[1] if module._did_swap_in_out_features else delta[1].T
        rows = torch.linalg.matrix_rank(
            torch.cat([of_one, down.view(module.num_experts, 2, -1)[1]])
        )
        assert int(rows) == 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_and_reloaded_equal_the_adapter(
    kind: str, shared_data: Path, tmp_path: Path
) -> None:
    folder = make_moe(kind, tmp_path / "model", shared_data / "tokenizers" / "minimind")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = logits_of(base)
    tuned = randomised(apply_tuner(base, settings_of(model=str(folder), lora_rank=4)))
    tuned.peft_config["default"].base_model_name_or_path = str(folder)
    expected = logits_of(tuned)
    assert (expected - before).abs().max() > 0.5
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-4)
    merged = merge(
        MergeConfig(adapters=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged"))
    )
    found = logits_of(transformers.AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_get_gradients_and_learn(kind: str) -> None:
    model = apply_tuner(tiny_moe(kind), settings_of())
    model.train()
    ids = torch.randint(3, 6400, (2, 48), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        moved = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
    of_experts = {name: g for name, g in moved.items() if re.search(r"experts\..*lora_[AB]", name)}
    assert of_experts
    assert all(gradient.abs().max() > 0 for gradient in of_experts.values())


@pytest.mark.slow
def test_a_run_trains_experts_says_so_and_its_checkpoint_is_plain(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_moe("glm4_moe", tmp_path / "model", shared_data / "tokenizers" / "minimind")
    rows = make_rows(tmp_path / "rows.jsonl", 8)
    config = config_of(
        folder, rows, tmp_path / "run", tuner_type="lora", template="chatml", max_steps=6
    )
    result = train(config)
    assert losses(result)[-1] < losses(result)[0]
    said = capsys.readouterr()
    text = said.out + said.err
    assert re.search(r"experts\.gate_up_proj +1 +4 x 32 x 32", text)
    assert re.search(r"in routers +0 +frozen, 128", text)
    assert "note: --lora_dropout 0.05 is on linear layers alone" in text
    saved = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), result["last_model_checkpoint"]
    )
    of_experts = [p for name, p in saved.named_parameters() if "experts.lora_B" in name]
    assert of_experts
    assert all(p.abs().max() > 0 for p in of_experts)


@pytest.mark.parametrize(
    ("kind", "settings", "pattern"),
    [
        ("qwen3_moe", {"target_modules": ["experts"]}, r"experts"),
        ("qwen3_moe", {"exclude_modules": ["experts"]}, r"self_attn"),
        ("qwen3_moe", {"target_modules": ["experts.down_proj", "q_proj"]}, r"experts\.lora|q_proj"),
        ("qwen3_moe", {"target_modules": ["gate", "v_proj"]}, r"mlp\.gate\.|v_proj"),
        (
            "qwen3_moe",
            {"target_modules": ["v_proj"], "modules_to_save": ["gate"]},
            r"gate\.|v_proj",
        ),
        ("glm4_moe", {"target_modules": ["shared_experts.up_proj"]}, r"shared_experts\.up_proj"),
        ("glm4_moe", {"layers_to_transform": [1]}, r"layers\.1\."),
        ("qwen3_moe", {"target_regex": r".*\.0\.mlp\.experts\.down_proj"}, r"0\.mlp\.experts"),
    ],
)
def test_names_choose_experts_and_routers(
    kind: str, settings: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    tuned = randomised(apply_tuner(tiny_moe(kind), settings_of(**settings)))
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained
    assert all(re.search(pattern, name) for name in trained), trained
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_moe(kind), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), logits_of(tuned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "--use_dora knows linear layers alone"),
        ({"init_weights": "pissa"}, "--init_weights pissa starts on linear layers alone"),
        ({"tuner_type": "sora"}, "--tuner_type sora knows linear layers alone"),
        ({"tuner_type": "adalora"}, "--tuner_type adalora knows linear layers alone"),
        ({"tuner_type": "oft", "oft_block_size": 8}, "--tuner_type oft knows linear layers alone"),
    ],
)
def test_a_tuner_that_cannot_train_experts_says_so_or_refuses(
    settings: dict[str, Any], reason: str
) -> None:
    if settings.get("tuner_type") == "oft":
        given = TrainConfig(model="m", dataset=["d"], **settings)
    else:
        given = settings_of(**settings)
    base = tiny_moe("deepseek_v3")
    note = notes_on_targets(base, given)[0]
    assert "experts.down_proj, experts.gate_up_proj" in note
    assert reason in note
    tuned = apply_tuner(base, given)
    assert not any("experts.lora" in name for name, _ in tuned.named_parameters())
    assert (
        notes_on_targets(tiny_moe("qwen3_moe"), replace(given, exclude_modules=["experts"])) == []
    )
    with pytest.raises(ConfigError, match=re.escape(reason)):
        apply_tuner(tiny_moe("qwen3_moe"), replace(given, target_modules=["experts"]))


def test_dropout_stays_on_linear_layers_and_the_saved_adapter_loads() -> None:
    tuned = apply_tuner(tiny_moe("qwen3_moe"), settings_of(lora_dropout=0.1))
    kinds = {
        type(m.lora_dropout["default"]).__name__
        for m in tuned.modules()
        if hasattr(m, "lora_dropout")
    }
    assert kinds == {"Dropout", "Identity"}
    assert tuned.peft_config["default"].lora_dropout == 0.0


def test_a_bias_or_a_convolution_is_no_expert() -> None:
    names = fused_experts(dict(tiny_moe("gpt_oss").named_modules()))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"gate_up_proj", "down_proj"}
    names = fused_experts(dict(tiny_moe("qwen3_next").named_modules()))
    assert all(".experts." in name for name in names)


def test_a_model_without_experts_has_the_table_it_had(model: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert " in " not in describe_parameters(apply_tuner(base, settings_of()))


def test_padding_in_place_of_packs_keeps_the_step() -> None:
    for given in ({}, {"gradient_accumulation_steps": 3}):
        config = settings_of(packing=True, max_length=64, per_device_train_batch_size=4, **given)
        for world_size in (1, 2):
            fallen = padded(config, world_size)
            assert fallen.tokens_per_batch == 256
            assert fallen.accumulation_steps(world_size) == config.accumulation_steps(world_size)
            assert fallen.per_device_eval_batch_size == 4


@pytest.mark.slow
def test_a_model_that_needs_padding_takes_the_steps_of_packs(
    shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = shared_data / "tokenizers" / "minimind"
    rows = make_rows(tmp_path / "rows.jsonl", 96)
    plans, tokens = {}, {}
    for kind in ("qwen3_moe", "gpt_oss"):
        folder = make_moe(kind, tmp_path / kind, tokenizer)
        given = {
            "tuner_type": "lora",
            "lora_dropout": 0.0,
            "template": "chatml",
            "packing": True,
            "max_length": 64,
            "per_device_train_batch_size": 4,
        }
        plans[kind] = train(config_of(folder, rows, tmp_path / "no", dry_run=True, **given))
        result = train(config_of(folder, rows, tmp_path / f"run-{kind}", **given))
        assert result["global_step"] == plans[kind]["steps"]["total"]
        tokens[kind] = plans[kind]["steps"]["tokens"] / result["global_step"]
    packed, fallen = plans["qwen3_moe"], plans["gpt_oss"]
    assert any("they are padded" in note for note in fallen["notes"])
    for plan in (packed, fallen):
        # 16 packs a step, which is the default whatever the rows are laid out like
        assert plan["batches"]["accumulation_steps"] == 4
        assert plan["memory"]["estimate"]["peak"] > 0
    # 16 times as many tokens a step before, and a quarter of the steps
    assert tokens["gpt_oss"] == pytest.approx(tokens["qwen3_moe"], rel=0.25)
    assert fallen["steps"]["total"] <= packed["steps"]["total"] + 2


@pytest.mark.slow
def test_an_estimate_counts_experts_and_what_is_left_out(shared_data: Path, tmp_path: Path) -> None:
    folder = make_moe("deepseek_v3", tmp_path / "model", shared_data / "tokenizers" / "minimind")
    rows = make_rows(tmp_path / "rows.jsonl", 8)
    given = {"tuner_type": "lora", "template": "chatml", "dry_run": True}
    plan = train(config_of(folder, rows, tmp_path / "run", **given))
    number = count_parameters(apply_tuner(tiny_moe("deepseek_v3"), settings_of()))[1]
    assert plan["model"]["trained_parameters"] == number
    assert {"experts.gate_up_proj", "experts.down_proj"} <= {
        kind["name"] for kind in plan["model"]["trained"]
    }
    assert plan["memory"]["estimate"]["peak"] > 0
    plan = train(
        config_of(folder, rows, tmp_path / "run", use_dora=True, lora_dropout=0.0, **given)
    )
    assert any("get no adapter, as --use_dora" in note for note in plan["notes"])
