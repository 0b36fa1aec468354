"""The same losses, however a global batch is laid out and whatever memory is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from sftcore.errors import ConfigError
from sftcore.train import train
from training import config_of, losses


@pytest.fixture(scope="module")
def few(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 rows: one global batch, so that every layout trains the same examples in each step."""
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines()[:16]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def expected(model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    config = config_of(
        model,
        few,
        tmp_path_factory.mktemp("plain"),
        loss_impl="plain",
        per_device_train_batch_size=16,
        num_train_epochs=4,
    )
    found = losses(train(config))
    assert len(found) == 4
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 16, "attn_impl": "eager"},
        {"per_device_train_batch_size": 16, "loss_chunk_size": 50},
        {"per_device_train_batch_size": 8, "padding_free": True},
        {"per_device_train_batch_size": 16, "padding_free": True, "loss_impl": "plain"},
        {"packing": True, "max_length": 512, "packing_length": 4096},
        {"packing": True, "max_length": 512, "per_device_train_batch_size": 16},
        {"packing": True, "max_length": 512, "gradient_accumulation_steps": 16},
        {"tokens_per_batch": 1024, "gradient_accumulation_steps": 16},
        {"per_device_train_batch_size": 16, "gradient_checkpointing": True},
        {
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kind": "selective",
        },
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_losses_do_not_depend_on_layout_or_memory(
    model: Path, few: Path, tmp_path: Path, expected: list[float], settings: dict[str, Any]
) -> None:
    config = replace(config_of(model, few, tmp_path), num_train_epochs=4, **settings)
    assert losses(train(config)) == pytest.approx(expected, rel=1e-4)


def test_offloaded_activations_change_nothing_and_weights_stay() -> None:
    import torch

    from sftcore.models.checkpointing import offload_activations

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    values = torch.randn(32, 64)
    net(values).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    with offload_activations(net.parameters, least_bytes=0):
        loss = net(values).square().sum()
    loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kind": "offload"},
        {"activation_offload": True},
        {"tf32": True},
        {"use_liger_kernel": True},
    ],
)
def test_what_only_a_gpu_has_is_refused_without_one(
    model: Path, few: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="has no effect without a GPU"):
        train(config_of(model, few, tmp_path, **settings))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_offload": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kind": "offload"},
        {"torch_dtype": "float32", "torch_compile": True},
    ],
)
def test_what_a_gpu_saves_changes_no_loss(
    model: Path, few: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = config_of(model, few, tmp_path / "a", torch_dtype="float32")
    expected = losses(train(config))
    found = losses(train(replace(config, output_dir=str(tmp_path / "b"), **settings)))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [{"padding_free": True}, {"packing": True, "max_length": 512}])
def test_flash_attention_keeps_examples_apart(
    model: Path, few: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("flash_attn", reason="needs the package flash-attn")
    settings = {"per_device_train_batch_size": 16, "tuner_type": "lora", "num_train_epochs": 2}
    config = config_of(model, few, tmp_path / "a", torch_dtype="bfloat16", **settings)
    expected = losses(train(replace(config, attn_impl="sdpa")))
    flash = replace(config, output_dir=str(tmp_path / "b"), attn_impl="flash_attention_2", **layout)
    assert losses(train(flash)) == pytest.approx(expected, rel=2e-2)
