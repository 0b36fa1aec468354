"""What a run would do: its plan, its memory, its largest batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sftcore.cli import main
from sftcore.data import BatchLoader, Encoder
from sftcore.errors import SftcoreError
from sftcore.models.attention import Attention
from sftcore.models.dtypes import Dtypes
from sftcore.train import train
from sftcore.train.estimate import BatchSize, estimate_step
from sftcore.train.largest import explain_out_of_memory, find_largest, read_batch
from sftcore.train.optimizers import choose_optimizer
from training import config_of, losses

FLOAT32 = Dtypes(weights=torch.float32, compute=torch.float32)
SDPA = Attention(name="sdpa", reason="")


def test_a_dry_run_says_what_the_run_then_does(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "tuner_type": "lora",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "split_dataset_ratio": 0.1,
    }
    output = tmp_path / "dry"
    plan = train(config_of(model, rows, output, dry_run=True, **settings))
    assert not output.exists()
    text = capsys.readouterr().out
    result = train(config_of(model, rows, tmp_path / "run", **settings))
    assert plan["steps"]["total"] == result["global_step"]
    assert plan["steps"]["tokens"] == pytest.approx(result["speed"]["num_tokens"], rel=1e-6)
    trained = result["speed"]["num_trained_tokens"]
    assert plan["steps"]["trained_tokens"] == pytest.approx(trained, rel=1e-6)
    assert plan["batches"]["padding_share"] == pytest.approx(
        result["speed"]["padding_share"], abs=0.01
    )
    logged = [entry["learning_rate"] for entry in result["log_history"] if "loss" in entry]
    rates = {point["step"]: point["rate"] for point in plan["learning_rate"]["points"]}
    assert rates == pytest.approx({step: logged[step - 1] for step in rates})
    assert plan["data"]["eval_examples"] == result["data"]["examples"] - plan["data"]["examples"]
    (kind,) = (kind for kind in plan["model"]["trained"] if kind["name"] == "q_proj")
    assert kind == {
        "name": "q_proj",
        "shape": "32 x 32",
        "modules": 2,
        "parameters": 2 * 8 * (32 + 32),
    }
    assert "measured in" in plan["time"]["how"]
    # steps of a tiny model vary, but are never off by an order
    assert 0.1 < plan["time"]["seconds_per_step"] / result["speed"]["seconds_per_step"] < 10
    lengths = plan["batches"]["lengths"]
    assert sum(lengths["counts"]) == plan["data"]["examples"]
    assert "dry run" in text
    assert f"{plan['data']['rows']:,} rows" in text
    assert max(map(len, text.splitlines())) <= 120
    assert re.search(r"█ \d+\n", text)


def test_a_plan_goes_to_a_file_or_to_the_output_as_json(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", str(model), "--dataset", str(rows), "--dry-run"]
    command += ["--output_dir", str(tmp_path / "output")]
    assert main([*command, "--dry_run_json", "-"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert "dry run" in captured.err
    assert main([*command, "--dry_run_json", str(tmp_path / "plan.json")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("dry run")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["steps"] == plan["steps"]
    assert not (tmp_path / "output").exists()


def llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(
        **{
            "vocab_size": 1000,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def estimated(settings: Any, size: BatchSize, model: Path, rows: Path, **changes: Any) -> Any:
    config = config_of(model, rows, Path("unused"), **changes)
    return estimate_step(
        config,
        settings,
        size,
        dtypes=FLOAT32,
        attention=SDPA,
        optimizer=choose_optimizer(config),
        accumulates=True,
    )


def test_an_estimate_counts_weights_exactly_and_tells_what_costs(model: Path, rows: Path) -> None:
    size = BatchSize(rows=4, width=256, trained_tokens=500)
    real = transformers.LlamaForCausalLM(llama())
    number = sum(parameter.numel() for parameter in real.parameters())
    full = estimated(llama(), size, model, rows)
    assert full.parameters == full.trained_parameters == number
    assert full.gradients == 4 * number
    # two moments of four bytes, and the count of steps of each parameter
    counts = 4 * len(list(real.parameters()))
    assert full.optimizer == 8 * number + counts
    assert full.peak > full.weights + full.gradients + full.optimizer + full.activations
    lora = estimated(llama(), size, model, rows, tuner_type="lora")
    assert lora.trained_parameters < number / 5
    assert lora.optimizer == pytest.approx(8 * lora.trained_parameters, rel=0.01)
    assert lora.gradients + lora.optimizer < (full.gradients + full.optimizer) / 5
    # what is kept grows with the rows, and checkpointing keeps less; the same is said of both ways
    double = estimated(llama(), BatchSize(rows=8, width=256, trained_tokens=1000), model, rows)
    assert double.activations == pytest.approx(2 * full.activations, rel=0.02)
    spared = estimated(llama(), size, model, rows, gradient_checkpointing=True)
    assert spared.activations < full.activations / 4
    assert (spared.peak_other, spared.peak) == (full.peak, full.peak_other)
    # no chunk of logits is larger than it has to be
    plain = estimated(llama(), size, model, rows, loss_impl="plain", tuner_type="lora")
    chunked = estimated(
        llama(), size, model, rows, loss_chunk_size=64, tuner_type="lora", loss_impl="chunked"
    )
    assert plain.loss > 4 * chunked.loss


def test_an_estimate_equals_what_tensors_really_take(model: Path, rows: Path) -> None:
    size = BatchSize(rows=2, width=128, trained_tokens=100)
    found = estimated(llama(), size, model, rows)
    kept: dict[int, int] = {}
    real = transformers.LlamaForCausalLM(llama()).train()
    real.config.use_cache = False
    weights = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = real.model(torch.zeros(2, 128, dtype=torch.int64)).last_hidden_state
    hidden.sum().backward()
    # what is alive beside what the backward pass keeps is counted too
    assert sum(kept.values()) <= found.activations <= 1.15 * sum(kept.values())


def test_a_model_of_70_billion_parameters_is_estimated_without_its_weights(
    model: Path, rows: Path
) -> None:
    settings = llama(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    size = BatchSize(rows=1, width=4096, trained_tokens=2000)
    found = estimated(settings, size, model, rows, gradient_checkpointing=True)
    # of 80 layers there are 4 here: 0.86 billion each, and 2.1 billion at both ends
    assert found.parameters == pytest.approx(4 * 0.8556e9 + 2.1e9, rel=0.01)
    assert found.peak > 16 * found.parameters


def test_a_model_that_needs_values_is_said_to(model: Path, rows: Path) -> None:
    class Undecided(transformers.LlamaConfig):
        model_type = "undecided"

    with pytest.raises(NotImplementedError, match="Undecided"):
        estimated(Undecided(), BatchSize(rows=1, width=8, trained_tokens=4), model, rows)


@pytest.mark.parametrize("layout", [{}, {"mode": "pack"}, {"tokens_per_batch": 700}])
def test_the_largest_batch_is_found_and_read_without_moving_the_loader(
    model: Path, rows: Path, layout: dict[str, Any]
) -> None:
    size = {} if "tokens_per_batch" in layout else {"batch_size": 3}
    loader = BatchLoader(
        rows,
        Encoder.from_pretrained(model, max_length=400),
        gradient_accumulation_steps=2,
        return_rows=True,
        **size,
        **layout,
    )
    sizes = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        sizes += [batch["input_ids"].numel() for batch in loader]
    loader.set_epoch(0)
    stream = iter(loader)
    for _ in range(4):
        next(stream)
    stream.close()
    before = loader.state_dict()
    epoch, number = find_largest(loader, 3)
    batch = read_batch(loader, epoch, number)
    assert batch["input_ids"].numel() == max(sizes)
    assert loader.state_dict() == before


def test_the_largest_batch_first_changes_no_bit_of_the_run(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "tuner_type": "lora",
        "lora_dropout": 0.3,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
    }
    plain = train(config_of(model, rows, tmp_path / "plain", **settings))
    tried = train(config_of(model, rows, tmp_path / "tried", test_oom=True, **settings))
    assert losses(tried) == losses(plain)
    shown = re.search(r"largest micro-batch, 4 x (\d+) tokens, fits", capsys.readouterr().err)
    assert shown is not None
    loader = BatchLoader(rows, Encoder.from_pretrained(model), batch_size=4)
    assert int(shown[1]) == max(loader.shapes(0)[:, 2])
    weights = [
        Path(result["last_model_checkpoint"]) / "adapter_model.safetensors"
        for result in (plain, tried)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for name in ("ledger.jsonl", "loader_state.json"):
        saved = [path.with_name(name) for path in weights]
        assert saved[0].read_bytes() == saved[1].read_bytes()


def test_memory_that_runs_out_names_the_batch_and_what_to_lower(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    config = config_of(model, rows, tmp_path, per_device_train_batch_size=8)
    with (
        pytest.raises(SftcoreError, match=r"micro-batch of 8 x 512 tokens") as found,
        explain_out_of_memory([(2, 900), (8, 512)], config),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    text = str(found.value)
    for advice in (
        "--gradient_checkpointing true",
        "--per_device_train_batch_size (now 8)",
        "--max_length (now 2,048)",
        "--tuner_type lora",
        "Tried to allocate 2 GiB",
    ):
        assert advice in text
    with pytest.raises(RuntimeError, match="shape mismatch"), explain_out_of_memory([], config):
        raise RuntimeError("shape mismatch")
    with (
        pytest.raises(SftcoreError, match="out of memory"),
        explain_out_of_memory([(1, 1)], config),
    ):
        torch.empty(2**62, dtype=torch.uint8)


def test_a_stream_is_judged_by_its_beginning(model: Path, rows: Path, tmp_path: Path) -> None:
    plan = train(
        config_of(
            model,
            rows,
            tmp_path / "dry",
            dry_run=True,
            streaming=True,
            max_steps=5,
            num_train_epochs=1,
        )
    )
    assert plan["steps"]["total"] == 5
    assert plan["data"]["rows"] is None
    assert any("stream" in note for note in plan["notes"])
    assert sum(plan["batches"]["lengths"]["counts"]) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_estimate_is_near_the_peak_of_a_gpu(model: Path, rows: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tuner_type": "full", "per_device_train_batch_size": 16}
    plan = train(config_of(model, rows, tmp_path / "dry", dry_run=True, **settings))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = train(config_of(model, rows, tmp_path / "run", test_oom=True, **settings))
    measured = result["speed"]["memory_gib"] * 2**30
    assert np.isclose(plan["memory"]["estimate"]["peak"], measured, rtol=0.3)
