"""A loss or gradient that is not finite: the rows at fault are named, and no weight sees it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, Encoder
from sftcore.errors import NonFiniteError
from sftcore.train import train
from sftcore.train.distributed import Engine, World
from sftcore.train.finite import FiniteGuard
from training import config_of, losses

RARE = " music"
STRIPED = (3, 17, 20, 41)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 short rows, four of them with a token that no other has, in question or answer."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"question": f"{n} plus one?", "answer": f"It is {n + 1}."} for n in range(48)]
    for number in STRIPED:
        lines[number]["question" if number % 2 else "answer"] += RARE
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def poisoned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a head of its own, and an embedding of the rare token that is infinite."""
    folder = tmp_path_factory.mktemp("poisoned")
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    net.config.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
    (token,) = Encoder.from_pretrained(model).tokenize(RARE).tolist()
    net.model.embed_tokens.weight.data[token] = math.inf
    net.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


def first_striped(model: Path, rows: Path, **layout: Any) -> tuple[int, list[int]]:
    """Returns the first step, from 1, with poisoned rows, and the lines of these."""
    encoder = Encoder.from_pretrained(model, max_length=2048)
    loader = BatchLoader(str(rows), encoder, **layout)
    for step, batch in enumerate(loader.plan(0), start=1):
        if found := sorted(set(batch) & set(STRIPED)):
            return step, [row + 1 for row in found]
    raise AssertionError


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"per_device_train_batch_size": 4}, {"batch_size": 4}),
        (
            {"per_device_train_batch_size": 4, "padding_free": True, "loss_impl": "plain"},
            {"batch_size": 4, "padding_free": True},
        ),
        (
            {"packing": True, "max_length": 256, "attn_impl": "eager", "tuner_type": "lora"},
            {"batch_size": 1, "mode": "pack", "pack_length": 256},
        ),
    ],
    ids=["padded", "padding-free", "packed lora"],
)
def test_just_the_rows_that_hold_a_poisoned_token_are_named(
    poisoned: Path,
    rows: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    layout: dict[str, Any],
) -> None:
    step, lines = first_striped(poisoned, rows, gradient_accumulation_steps=3, **layout)
    given = {"gradient_accumulation_steps": 3, "warmup_ratio": 0.0, **settings}
    with pytest.raises(NonFiniteError) as caught:
        train(config_of(poisoned, rows, tmp_path, **given))
    message = str(caught.value)
    assert message.startswith(f"step {step}: the loss is not finite, caused by")
    assert "embed_tokens.weight" in message
    written = json.loads((tmp_path / "non_finite.json").read_text(encoding="utf-8"))
    (event,) = written["first_steps"]
    assert event["step"] == step
    assert event["num_micro_batches"] <= 3
    assert sorted(row["line"] for row in event["rows"]) == lines
    for row in event["rows"]:
        assert row["path"] == str(rows)
        assert RARE in row["text"]
        assert f"{rows}:{row['line']}: loss nan" in message
    others = set(range(1, 49)) - set(lines)
    assert not [line for line in others if f"{rows}:{line}:" in message]


def test_a_skipped_step_leaves_the_weights_and_is_counted(
    poisoned: Path, rows: Path, tmp_path: Path
) -> None:
    config = config_of(
        poisoned,
        rows,
        tmp_path,
        on_non_finite="skip",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        num_train_epochs=2,
        save_steps=1,
        save_total_limit=None,
    )
    result = train(config)
    loader = BatchLoader(
        str(rows), Encoder.from_pretrained(poisoned), batch_size=4, gradient_accumulation_steps=2
    )
    plan = [*loader.plan(0), *loader.plan(1)]
    skipped = [step for step, batch in enumerate(plan, start=1) if set(batch) & set(STRIPED)]
    assert 2 <= len(skipped) < len(plan)
    entries = {entry["step"]: entry for entry in result["log_history"] if "token_acc" in entry}
    counted = [entry for entry in result["log_history"] if "skipped_steps" in entry]
    assert counted[-1]["skipped_steps"] == len(skipped)
    for step in range(1, len(plan) + 1):
        assert ("loss" in entries.get(step, {})) == (step not in skipped)
    values = losses(result)
    assert len(values) == len(plan) - len(skipped)
    assert all(math.isfinite(value) for value in values)
    assert counted[-1]["train_loss"] == pytest.approx(sum(values) / len(values))
    before = load_file(poisoned / "model.safetensors")
    (token,) = Encoder.from_pretrained(poisoned).tokenize(RARE).tolist()
    for step in range(1, len(plan) + 1):
        after = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step in skipped)
        before = after
    embeddings = after.pop("model.embed_tokens.weight")
    assert torch.isinf(embeddings[token]).all()
    assert torch.isfinite(embeddings).all(dim=1).sum() == len(embeddings) - 1
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())
    text = (tmp_path / "non_finite.json").read_text(encoding="utf-8")
    assert json.loads(text)["num_steps"] == len(skipped)
    assert "NaN" not in (tmp_path / "logging.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("tuner_type", ["lora", "adalora", "sora"])
def test_a_skipped_step_leaves_an_adapter_alone(
    poisoned: Path, rows: Path, tmp_path: Path, tuner_type: str
) -> None:
    settings: dict[str, Any] = {"adalora_tinit": 2, "adalora_tfinal": 2, "adalora_deltaT": 1}
    config = config_of(
        poisoned,
        rows,
        tmp_path,
        tuner_type=tuner_type,
        on_non_finite="skip",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        warmup_ratio=0.0,
        save_steps=1,
        save_total_limit=None,
        **(settings if tuner_type == "adalora" else {}),
    )
    result = train(config)
    loader = BatchLoader(str(rows), Encoder.from_pretrained(poisoned), batch_size=4)
    plan = list(loader.plan(0))
    skipped = [step for step, batch in enumerate(plan, start=1) if set(batch) & set(STRIPED)]
    assert result["global_step"] == len(plan) == 12
    saved = [
        load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in range(1, 13)
    ]
    # AdaLoRA fixes its ranks at its own time, with or without a step
    compared = range(2, 10) if tuner_type == "adalora" else range(2, 13)
    for step in compared:
        before, after = saved[step - 2], saved[step - 1]
        same = before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
        assert same == (step in skipped)


def test_losses_logged_over_several_steps_leave_out_the_skipped_ones(
    poisoned: Path, rows: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "on_non_finite": "skip",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    each = train(config_of(poisoned, rows, tmp_path / "each", **settings))
    four = train(config_of(poisoned, rows, tmp_path / "four", logging_steps=4, **settings))
    by_step = {entry["step"]: entry["loss"] for entry in each["log_history"] if "loss" in entry}
    previous = 0
    entries = [entry for entry in four["log_history"] if "loss" in entry]
    # the first step is logged too, unless it was skipped
    expected = [step for step in (1, 4, 8, 12) if step > 1 or step in by_step]
    assert [entry["step"] for entry in entries] == expected
    assert len(by_step) < 12
    for entry in entries:
        window = [by_step[s] for s in range(previous + 1, entry["step"] + 1) if s in by_step]
        assert entry["loss"] == pytest.approx(sum(window) / len(window), rel=1e-5)
        previous = entry["step"]


def test_a_gradient_that_overflows_names_its_row_though_its_loss_does_not(
    model: Path, tmp_path: Path
) -> None:
    lines = []
    for number in range(16):
        answer = {"role": "assistant", "content": f"It is {number}.", "weight": 1.0}
        if number == 6:
            answer["weight"] = 1e30
        question = {"role": "user", "content": f"What is {number}?"}
        lines.append(json.dumps({"messages": [question, answer]}))
    file = tmp_path / "heavy.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    config = config_of(model, file, tmp_path / "run", per_device_train_batch_size=4)
    message = rf"step 1: the norm of the gradients is not finite, caused by {file}:7: its gradient;"
    with pytest.raises(NonFiniteError, match=message):
        train(config)


def guard_of(tmp_path: Path, scaler: object, *, skips: bool) -> FiniteGuard:
    accelerator: Any = SimpleNamespace(
        scaler=scaler,
        distributed_type="NO",
        unwrap_model=lambda net: net,
        device=torch.device("cpu"),
    )
    nothing: Any = None
    return FiniteGuard(
        loader=nothing,
        method=nothing,
        accelerator=accelerator,
        engine=Engine(TrainConfig(model="m", dataset=["d"]), World()),
        folder=tmp_path,
        skips=skips,
    )


def test_an_overflow_that_the_gradient_scaler_answers_is_no_error(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    guard = guard_of(tmp_path, object(), skips=False)
    guard.begin([], None)
    guard.note(torch.tensor(1.0))
    assert guard.check(net, torch.tensor(math.inf), step=0, logged_step=0) is None
    assert not guard.num_skipped
    # a loss that is not finite is one all the same
    guard.begin([], None)
    assert guard.note(torch.tensor(math.nan)) == 0
    with pytest.raises(NonFiniteError):
        guard.check(net, torch.tensor(math.nan), step=1, logged_step=0)


def test_a_run_that_only_skips_comes_to_an_end(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    guard = guard_of(tmp_path, None, skips=True)
    with pytest.raises(NonFiniteError, match="20 optimizer steps in a row"):
        for step in range(30):
            guard.begin([], None)
            guard.note(torch.tensor(math.inf))
            guard.check(net, torch.tensor(1.0), step=step, logged_step=0)
    assert step == 19


@pytest.mark.gpu
def test_float16_overflows_and_goes_on(model: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: the gradient scaler of float16 runs there alone")
    lines = []
    for number in range(64):
        answer = {"role": "assistant", "content": f"It is {number}.", "weight": 1e4}
        question = {"role": "user", "content": f"What is {number}?"}
        lines.append(json.dumps({"messages": [question, answer]}))
    file = tmp_path / "heavy.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    config = config_of(
        model, file, tmp_path / "run", tuner_type="lora", torch_dtype="float16", num_train_epochs=4
    )
    result = train(config)
    assert result["global_step"] == 16
    assert all(math.isfinite(value) for value in losses(result))
