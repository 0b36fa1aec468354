"""SoRA: ranks whose gate is 0 are gone, and nothing else is changed by that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file

from sftcore.config import MergeConfig, TrainConfig
from sftcore.errors import ConfigError
from sftcore.export import merge
from sftcore.train.parameters import parameter_groups
from sftcore.tuners import learning_rate_factors
from sftcore.tuners.sora import soft_threshold
from tiny_runs import make_model
from training import config_of, losses
from tuned import logits_of, tune


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


def settings_of(model: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "tuner_type": "sora",
        "max_steps": 4,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "sora_lr": 0.05,
        "sora_lambda": 3.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    return config_of(model, rows, output, **{**given, **settings})


def plainly(model: Path, checkpoint: Path) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, checkpoint)


def test_gates_move_towards_zero_and_stay_there() -> None:
    values = torch.tensor([2.0, 0.3, -0.3, -2.0, 0.0])
    assert soft_threshold(values, 0.5).tolist() == [1.5, 0.0, 0.0, -1.5, 0.0]
    # the least point of a square with an L1 term, which is what a proximal step finds
    grid = torch.linspace(-3, 3, 6001)
    for value in values:
        costs = 0.5 * (grid - value) ** 2 + 0.5 * grid.abs()
        assert grid[costs.argmin()] == pytest.approx(float(soft_threshold(value, 0.5)), abs=1e-3)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_zero_gates_are_pruned_and_plain_peft_gives_equal_logits(
    model: Path, rows: Path, tmp_path: Path, use_rslora: bool
) -> None:
    config = settings_of(
        model, rows, tmp_path / "run", use_rslora=use_rslora, modules_to_save=["LN"]
    )
    tuned = tune(config)
    gates = [gate.detach() for gate in tuned.model.gates().values()]
    zero = sum(int((gate == 0).sum()) for gate in gates)
    assert 0 < zero < sum(map(len, gates))
    weights = load_file(tuned.checkpoint / "adapter_model.safetensors")
    ranks = {name: len(value) for name, value in weights.items() if "lora_A" in name}
    assert sum(ranks.values()) == sum(map(len, gates)) - zero
    assert not any(name.endswith(".gate") or "parametrizations" in name for name in weights)
    last = [entry for entry in tuned.result["log_history"] if "loss" in entry][-1]
    assert last["sora_zero_gates"] == pytest.approx(zero / sum(map(len, gates)))
    assert last["sora_mean_rank"] == pytest.approx(sum(ranks.values()) / len(gates))
    expected = logits_of(tuned.model)
    plain = plainly(model, tuned.checkpoint)
    torch.testing.assert_close(logits_of(plain), expected, rtol=1e-4, atol=1e-5)
    merged = merge(MergeConfig(adapters=str(tuned.checkpoint), output_dir=str(tmp_path / "merged")))
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits_of(whole), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_without_any_rank_left_still_loads(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    tuned = tune(settings_of(model, rows, tmp_path, sora_lambda=200.0, max_steps=2))
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(logits_of(plainly(model, tuned.checkpoint)), logits_of(base))
    settings = json.loads((tuned.checkpoint / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 1


def test_without_lambda_no_gate_is_closed(model: Path, rows: Path, tmp_path: Path) -> None:
    tuned = tune(settings_of(model, rows, tmp_path, sora_lambda=0.0, max_steps=2))
    assert all(gate.count_nonzero() == len(gate) for gate in tuned.model.gates().values())


def test_a_resumed_run_has_the_same_gates(model: Path, rows: Path, tmp_path: Path) -> None:
    whole = settings_of(model, rows, tmp_path / "whole", save_steps=2, lora_dropout=0.1)
    first = tune(whole)
    middle = str(tmp_path / "whole" / "checkpoint-2")
    on = replace(whole, output_dir=str(tmp_path / "on"), resume_from_checkpoint=middle)
    resumed = tune(on)
    assert losses(resumed.result) == losses(first.result)
    after = resumed.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in first.model.state_dict().items())
    with pytest.raises(ConfigError, match="the saved state does not fit"):
        tune(replace(on, output_dir=str(tmp_path / "other"), lora_rank=4))


def test_gates_have_their_learning_rate_and_no_decay(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    config = settings_of(model, rows, tmp_path, max_steps=1)
    tuned = tune(config)
    factors = learning_rate_factors(tuned.model, config)
    assert factors == dict.fromkeys(tuned.model.gates(), pytest.approx(5.0))
    trained = [p for p in tuned.model.parameters() if p.requires_grad]
    decayed = {name for name, _ in tuned.model.named_parameters()}
    groups, _ = parameter_groups(tuned.model, config, decayed=decayed)
    rate = config.effective_learning_rate
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (rate, config.weight_decay),
        (pytest.approx(rate * 5), 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(trained)
