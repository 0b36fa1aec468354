"""What `--deepspeed` takes: names, files, and nothing that says something else than the run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from sftcore.config import TrainConfig
from sftcore.config.zero import fill_sizes, read_deepspeed
from sftcore.errors import ConfigError
from sftcore.train.distributed import World, choose_engine
from sftcore.train.distributed.zero import deepspeed_settings


def config_of(**settings: Any) -> TrainConfig:
    given = {"model": "none", "dataset": ["none"], "deepspeed": "zero2", "tuner_type": "lora"}
    return TrainConfig(**{**given, **settings})


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"),
    [
        ("zero0", 0, []),
        ("zero1", 1, []),
        ("zero2", 2, []),
        ("zero3", 3, []),
        ("zero2_offload", 2, ["offload_optimizer"]),
        ("zero3-offload", 3, ["offload_optimizer", "offload_param"]),
        ("default-zero2", 2, []),
        ("default-zero3", 3, []),
    ],
)
def test_a_name_stands_for_a_stage(name: str, stage: int, offloaded: list[str]) -> None:
    zero = read_deepspeed(name)["zero_optimization"]
    assert zero["stage"] == stage
    assert [part for part in zero if part.startswith("offload")] == offloaded


def test_nothing_is_left_to_fill(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(read_deepspeed("zero3_offload")))
    config = config_of(deepspeed=str(file), max_grad_norm=0.3, gradient_accumulation_steps=3)
    settings, _ = deepspeed_settings(config, World(size=2))
    fill_sizes(settings, 64)
    assert "auto" not in json.dumps(settings)
    assert settings["gradient_clipping"] == 0.3
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["zero_optimization"]["reduce_bucket_size"] == 4096


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, ["micro_batch", "per_device_train_batch_size"]),
        ({"gradient_accumulation_steps": 7}, ["7", "--gradient_accumulation_steps is 4"]),
        ({"train_batch_size": 99}, ["train_batch_size 99", "make 8"]),
        ({"gradient_clipping": 2.5}, ["2.5", "--max_grad_norm is 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled True", "float32"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, ["params.lr 1", "learning_rate"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["OneBitAdam", "--optim"]),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
            ["warmup_num_steps 9", "--lr_scheduler_type cosine"],
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, ["autotp_size 2", "--tensor_parallel_size"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning", "data plan"]),
        ({"elasticity": {"enabled": True}}, ["elasticity", "global batch"]),
    ],
)
def test_what_contradicts_the_run_is_named_with_what_it_contradicts(
    more: dict[str, Any], named: list[str]
) -> None:
    text = json.dumps({"zero_optimization": {"stage": 1}, **more})
    config = config_of(deepspeed=text, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(config, World(size=2))
    for part in named:
        assert part in str(caught.value)


def test_blocks_that_say_the_same_are_taken_over_and_told() -> None:
    blocks = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}},
        "train_batch_size": 8,
    }
    text = json.dumps({"zero_optimization": {"stage": 2}, **blocks})
    config = config_of(deepspeed=text, gradient_accumulation_steps=4)
    settings, lines = deepspeed_settings(config, World(size=2))
    assert not set(blocks) & set(settings)
    assert len(lines) == 2


@pytest.mark.parametrize(
    "value", ["zero4", "missing.json", '{"zero_optimization": {"stage": 4}}', "{broken", "{}"]
)
def test_another_value_is_an_error_at_once(value: str) -> None:
    with pytest.raises(ConfigError, match="--deepspeed"):
        config_of(deepspeed=value)


def test_a_wrong_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="zero2_offload"):
        config_of(deepspeed="zero2_ofload")


REFUSED = [
    ({"tuner_type": "adalora"}, "adalora cannot be trained with DeepSpeed"),
    ({"tuner_type": "sora"}, "sora cannot be trained with DeepSpeed"),
    ({"optim": "muon"}, "--optim muon cannot be used"),
    ({"deepspeed": "zero2_offload", "optim": "sgd"}, "on the host DeepSpeed runs AdamW alone"),
    ({"test_oom": True}, "--test_oom cannot be used"),
    ({"deepspeed": "zero3", "tuner_type": "vera"}, "take --deepspeed zero2"),
    ({"deepspeed": "zero3", "use_dora": True}, "--use_dora cannot be used"),
    ({"deepspeed": "zero3", "init_weights": "pissa"}, "--init_weights pissa cannot be used"),
    ({"deepspeed": "zero3", "modules_to_save": ["LN"]}, "--modules_to_save cannot be used"),
    ({"deepspeed": "zero3", "quant_method": "bnb", "quant_bits": 4}, "--quant_bits 4 cannot"),
]


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"
)
@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_sharding_would_change_is_refused_before_anything_is_read(
    settings: dict[str, Any], message: str
) -> None:
    config = config_of(**settings)
    with pytest.raises(ConfigError, match=message):
        choose_engine(config, World(size=2))


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sftcore\[deepspeed\]'"):
        choose_engine(config_of(), World())
