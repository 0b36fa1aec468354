"""What a run says it checked: each comparison, that a fault is found by it, and where all of it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from experts import tiny_moe
from sftcore.config import TrainConfig
from sftcore.data import Encoder
from sftcore.train import train
from sftcore.train.inputs import InputKind
from sftcore.train.probe import compare_packed
from sftcore.train.proofs import (
    Proof,
    coverage_proof,
    describe_proofs,
    loss_proof,
    merge_proof,
    packing_proof,
    prompt_proof,
)
from sftcore.tuners import apply_tuner
from tiny_runs import make_rows
from training import config_of
from tuned import logits_of

NAMES = [
    "packed against separate logits",
    "coverage of the adapter",
    "chunked against plain loss",
    "prompt of inference against training text",
    "merged against adapter",
]


def settings_of(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "dataset": ["d"], "lora_dropout": 0.0, **settings})


def tuned_of(kind: str = "qwen3_moe", **settings: Any) -> Any:
    model = apply_tuner(tiny_moe(kind), settings_of(**settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch_of(model: Any) -> dict[str, Any]:
    ids = torch.randint(3, 6400, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :11] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def test_a_run_lists_what_it_checked_in_its_last_lines_and_its_result(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(tmp_path / "rows.jsonl", 8)
    result = train(
        config_of(
            model,
            rows,
            tmp_path / "run",
            tuner_type="lora",
            packing=True,
            max_length=64,
            max_steps=2,
        )
    )
    found = {proof["name"]: proof for proof in result["proved"]}
    assert list(found) == NAMES
    assert {proof["outcome"] for proof in found.values()} == {"proved"}, found
    assert found["merged against adapter"]["value"] < 1e-4
    assert found["chunked against plain loss"]["value"] < 1e-5
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["proved"] == result["proved"]
    said = capsys.readouterr()
    text = said.out + said.err
    assert "checked in this run:" in text
    assert all(name in text for name in NAMES)


def test_merging_for_a_moment_leaves_every_bit_and_finds_a_wrong_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tuned_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits_of(model)
    proof = merge_proof(model, settings_of())
    assert proof.outcome == "proved", proof
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model), expected)

    def half() -> None:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.merged_adapters.append("default")

    monkeypatch.setattr(model.base_model, "merge_adapter", half)
    assert merge_proof(model, settings_of()).outcome == "differs"


def test_the_chunked_loss_is_compared_in_value_and_gradient() -> None:
    model = tuned_of()
    proof = loss_proof(model, batch_of(model), InputKind(), None)
    assert proof.outcome == "proved", proof
    plain = model.get_base_model().forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        found.logits = torch.tanh(found.logits / 5) * 5
        return found

    model.get_base_model().forward = capped
    assert loss_proof(model, batch_of(model), InputKind(), None).outcome == "differs"
    assert loss_proof(model, None, InputKind(), "as asked for").outcome == "not checked"


def test_packing_gives_its_measure() -> None:
    reason, distance = compare_packed(tiny_moe("qwen3_moe"), InputKind())
    proof = packing_proof(reason, distance, asked=True)
    assert proof.outcome == "proved"
    assert proof.value is not None
    assert proof.value < 1e-4
    reason, distance = compare_packed(tiny_moe("gpt_oss"), InputKind())
    assert packing_proof(reason, distance, asked=True).outcome == "differs"
    assert packing_proof(None, None, asked=False).outcome == "not checked"


def test_coverage_names_what_is_left_out() -> None:
    settings = {"target_modules": ["q_proj", "v_proj"]}
    proof = coverage_proof(tuned_of(**settings), settings_of(**settings))
    assert proof.value is not None
    assert proof.value < 0.2
    assert "experts.gate_up_proj" in proof.detail


def test_a_prompt_that_training_does_not_begin_with_is_named(model: Path, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(model)
    rows = make_rows(tmp_path / "rows.jsonl", 3)
    config = config_of(model, rows, tmp_path / "run")
    proof = prompt_proof(encoder, [rows], config)
    assert proof.outcome == "proved"
    assert "3 of 3 rows" in proof.detail
    other = config_of(model, rows, tmp_path / "run", system="be brief")
    proof = prompt_proof(encoder, [rows], other)
    assert proof.outcome == "differs"
    assert f"{rows}:1" in proof.detail


def test_the_lines_are_aligned() -> None:
    lines = describe_proofs(
        [
            Proof(name="a", outcome="proved", detail="x"),
            Proof(name="longer", outcome="not checked", detail="y"),
        ]
    ).splitlines()
    assert lines == ["checked in this run:", "  a       proved: x", "  longer  not checked: y"]
