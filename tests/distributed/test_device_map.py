"""`--device_map`: layers on several GPUs of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from processes import settings_of
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train import train
from sftcore.train.distributed import World, choose_engine

torch = pytest.importorskip("torch")


def config_of(device_map: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset=["d"], device_map=device_map)


def test_several_processes_are_refused_with_engines_that_use_them() -> None:
    with pytest.raises(ConfigError, match="--fsdp or --tensor_parallel_size"):
        choose_engine(config_of("auto"), World(size=2, local_size=2))


def test_a_layer_is_never_cut_when_a_model_is_planned_over_devices(model: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    settings = transformers.AutoConfig.from_pretrained(model)
    settings.num_hidden_layers = 6
    with torch.device("meta"):
        planned = transformers.AutoModelForCausalLM.from_config(settings)
    layer = sum(p.numel() * p.element_size() for p in planned.model.layers[0].parameters())
    embedding = planned.model.embed_tokens.weight
    outer = embedding.numel() * embedding.element_size()
    plan = accelerate.infer_auto_device_map(
        planned,
        max_memory={0: outer + 3 * layer, 1: 4 * layer, 2: 8 * layer},
        no_split_module_classes=planned._no_split_modules,
    )
    places = [plan[f"model.layers.{number}"] for number in range(6)]
    assert places == sorted(places)
    assert len(set(places)) > 1
    # tied weights lie together
    assert plan["model.embed_tokens"] == plan.get("lm_head", plan["model.embed_tokens"])


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are GPUs to spread a model over")
@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_without_several_gpus_a_warning_says_so_and_the_run_is_plain(
    model: Path, rows: Path, tmp_path: Path, device_map: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"max_steps": 3, "gradient_accumulation_steps": 1}
    plain = train(TrainConfig(**settings_of(model, rows, tmp_path / "plain", **given)))
    spread = settings_of(model, rows, tmp_path / "spread", **given, device_map=device_map)
    capsys.readouterr()
    found = train(TrainConfig(**spread))
    assert f"--device_map {device_map} has no effect" in capsys.readouterr().err

    def losses(result: dict[str, Any]) -> list[float]:
        return [entry["loss"] for entry in result["log_history"] if "loss" in entry]

    assert losses(found) == losses(plain)


@pytest.mark.gpu
@pytest.mark.parametrize("tuner_type", ["full", "lora"])
def test_a_model_on_two_gpus_learns_what_it_learns_on_one(
    model: Path, rows: Path, tmp_path: Path, tuner_type: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given = {"tuner_type": tuner_type, "torch_dtype": "float32"}
    results = [
        train(TrainConfig(**settings_of(model, rows, tmp_path / name, **given, **more)))
        for name, more in {"one": {}, "two": {"device_map": "balanced"}}.items()
    ]
    one, two = (
        [entry["loss"] for entry in result["log_history"] if "loss" in entry] for result in results
    )
    assert two == pytest.approx(one, abs=1e-4)
