"""Evaluation while training: exact numbers, answers, the best checkpoint, an early end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file

from sftcore.config import InferConfig, TrainConfig
from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError, NonFiniteError
from sftcore.infer.generate import Chat
from sftcore.models.generation import generate_answers, generation_config
from sftcore.train import train
from sftcore.train.distributed import Engine, World
from sftcore.train.early_stopping import without_improvement
from sftcore.train.evaluate import Evaluator, evaluate_tokens
from sftcore.train.inputs import shift
from sftcore.train.loss import TokenLosses
from sftcore.train.predict import read_questions
from training import config_of, losses

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"batch_size": 1, "mode": "sequential"},
    "padded": {"batch_size": 7, "mode": "bucket"},
    "padding-free": {"batch_size": 7, "padding_free": True},
    "packed": {"batch_size": 2, "mode": "pack", "pack_length": 700},
}


def by_label(batch: dict[str, Any]) -> TokenLosses:
    """Losses and right tokens that one can tell from the labels alone."""
    labels = shift(batch["labels"], -100)
    labels = labels[labels != -100]
    return TokenLosses(torch.zeros(()), labels / 1000, labels % 37 != 0)


@pytest.fixture(scope="module")
def two_sets(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of rows."""
    folder = tmp_path_factory.mktemp("sets")
    lines = rows.read_text(encoding="utf-8").splitlines()
    (folder / "first.jsonl").write_text("\n".join(lines[:20]), encoding="utf-8")
    (folder / "second.jsonl").write_text("\n".join(lines[20:40]), encoding="utf-8")
    return [folder / "first.jsonl", folder / "second.jsonl"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows with few tokens."""
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    lines = [{"question": f"{n} plus one?", "answer": str(n + 1)} for n in range(64)]
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


def expected_metrics(encoder: Encoder, files: list[Path]) -> dict[str, float]:
    """The same numbers from one row after another."""
    of_sets = []
    for file in files:
        labels = [
            [int(label) for label in encoder.encode(line).labels[1:] if label != -100]
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        of_sets.append([row for row in labels if row])
    tokens = [[label for row in part for label in row] for part in of_sets]
    every = [label for part in tokens for label in part]
    examples = [row for part in of_sets for row in part]
    loss = sum(every) / len(every) / 1000
    whole = [all(label % 37 for label in row) for row in examples]
    assert 0 < sum(whole) < len(whole)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "token_acc": sum(label % 37 != 0 for label in every) / len(every),
        "seq_acc": sum(whole) / len(whole),
        "loss/first": sum(tokens[0]) / len(tokens[0]) / 1000,
        "loss/second": sum(tokens[1]) / len(tokens[1]) / 1000,
    }


def evaluate_ranks(
    encoder: Encoder, files: list[Path], world_size: int, find: Any = by_label, **layout: Any
) -> Any:
    """Evaluates as so many ranks would, one after the other."""
    kept: list[Any] = []

    def keep(sums: Any, _: str) -> Any:
        kept.append(sums)
        return sum(kept)

    for rank in range(world_size):
        loader = BatchLoader(
            [str(file) for file in files],
            encoder,
            return_rows=True,
            rank=rank,
            world_size=world_size,
            **layout,
        )
        device = torch.device("cpu")
        found = evaluate_tokens(loader, find, loader, keep, device=device, shows_seq_acc=True)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_one_row_after_another(
    model: Path, two_sets: list[Path], layout: str, world_size: int
) -> None:
    encoder = Encoder.from_pretrained(model, max_length=512)
    found = evaluate_ranks(encoder, two_sets, world_size, **LAYOUTS[layout])
    assert found.metrics == pytest.approx(expected_metrics(encoder, two_sets), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_is_not_finite_is_named_and_left_out(
    model: Path, two_sets: list[Path], layout: str
) -> None:
    encoder = Encoder.from_pretrained(model, max_length=512)
    wrong = json.loads(two_sets[0].read_text(encoding="utf-8").splitlines()[4])
    labels = {int(label) for label in encoder.encode(wrong).labels if label != -100}
    rest = [line for file in two_sets for line in file.read_text(encoding="utf-8").splitlines()]
    others = {
        int(label)
        for line in rest
        if json.loads(line) != wrong
        for label in encoder.encode(line).labels
    }
    rare = min(labels - others)

    def find(batch: dict[str, Any]) -> TokenLosses:
        total, found, right = by_label(batch)
        return TokenLosses(total, found.where(found != rare / 1000, math.nan), right)

    found = evaluate_ranks(encoder, two_sets, 1, find, **LAYOUTS[layout])
    assert found.non_finite == [4]
    assert found.metrics["non_finite"] == 1
    lines = [line for line in rest if json.loads(line) != wrong]
    assert math.isfinite(found.metrics["loss"])
    tokens = [
        int(label) for line in lines for label in encoder.encode(line).labels[1:] if label != -100
    ]
    assert found.metrics["loss"] == pytest.approx(sum(tokens) / len(tokens) / 1000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_asked_as_inference_asks(
    model: Path, rows: Path, tmp_path: Path, layout: str
) -> None:
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()[:12]]
    chats = [
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": line["question"]},
            {"role": "assistant", "content": "Wait."},
            {"role": "user", "content": "再说一遍！"},
            {"role": "assistant", "content": line["answer"]},
        ][number % 2 * 3 - number % 2 :]
        for number, line in enumerate(lines)
    ]
    chats = [chat if chat[0]["role"] != "assistant" else chat[1:] for chat in chats]
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "\n".join(json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats),
        encoding="utf-8",
    )
    encoder = Encoder.from_pretrained(model, max_length=512)
    loader = BatchLoader([str(file)], encoder, return_rows=True, **LAYOUTS[layout])
    alone = Engine(TrainConfig(model=str(model), dataset=[str(file)]), World())
    questions = read_questions(loader, 12, alone)
    assert len(questions) == 12
    by_line = {question.place[1]: question for question in questions if question.place}
    for number, chat in enumerate(chats, start=1):
        assert by_line[number].prompt == encoder.encode_prompt(chat[:-1]).tolist()
        assert by_line[number].reference == chat[-1]["content"]
    # the loader stands where it stood
    assert sum(len(batch["rows"]) for batch in loader) == 12


def test_answers_do_not_depend_on_who_shares_their_batch(model: Path, rows: Path) -> None:
    chat = Chat(InferConfig(model=str(model), max_new_tokens=10))
    questions = [json.loads(line)["question"] for line in rows.read_text().splitlines()[:9]]
    conversations = [
        [{"role": "user", "content": text[: 20 * n]}] for n, text in enumerate(questions, 1)
    ]
    prompts = [chat.encoder.encode_prompt(messages).tolist() for messages in conversations]
    assert len({len(prompt) for prompt in prompts}) > 5
    for batch_size in (1, 4, 9):
        found = generate_answers(
            chat.model, prompts, chat.generation, batch_size=batch_size, seed=0
        )
        texts = [chat.encoder.decode(ids).strip() for ids in found]
        assert texts == [chat.answer(messages) for messages in conversations]


def test_an_answer_ends_at_its_stop_token_and_with_the_positions_of_the_model(model: Path) -> None:
    chat = Chat(InferConfig(model=str(model), max_new_tokens=10))
    prompt = chat.encoder.encode_prompt([{"role": "user", "content": "Hi"}]).tolist()
    (whole,) = generate_answers(chat.model, [prompt], chat.generation, batch_size=1, seed=0)
    assert len(whole) == 10
    generation = generation_config(chat.encoder, chat.config)
    generation.eos_token_id = [whole[6]]
    end = whole.index(whole[6])
    assert generate_answers(chat.model, [prompt], generation, batch_size=1, seed=0) == [whole[:end]]
    chat.model.config.max_position_embeddings = len(prompt) + 4
    (short,) = generate_answers(chat.model, [prompt], chat.generation, batch_size=1, seed=0)
    assert short == whole[:4]


def test_answers_are_written_and_change_nothing_of_the_training(
    model: Path, sums: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("torchmetrics")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"query": "one"}\n{"query": "two"}\n')
    plain = config_of(
        model,
        sums,
        tmp_path / "plain",
        tuner_type="lora",
        lora_dropout=0.3,
        per_device_train_batch_size=8,
        split_dataset_ratio=0.2,
        max_steps=4,
        eval_steps=2,
        save_steps=2,
        per_device_eval_batch_size=4,
    )
    answering = replace(
        plain,
        output_dir=str(tmp_path / "answering"),
        predict_with_generate=True,
        predict_rows=5,
        sample_prompts=["Hello, you", str(prompts)],
        max_new_tokens=6,
        temperature=1.0,
        eval_on_start=True,
    )
    expected, result = train(plain), train(answering)
    assert losses(result) == losses(expected)
    run = tmp_path / "answering"
    evaluations = [entry for entry in result["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]
    for entry in evaluations:
        file = run / "predictions" / f"step-{entry['step']}.jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == 5
        for name in ("rouge-1", "rouge-2", "rouge-l", "exact_match"):
            mean = sum(line[name] for line in lines) / 5
            assert entry[f"eval_{name}"] == pytest.approx(mean)
        assert entry["eval_bleu-4"] >= 0
    source = sums.read_text(encoding="utf-8").splitlines()
    for line in lines:
        row = json.loads(source[line["line"] - 1])
        assert line["reference"] == row["answer"].strip()
        assert row["question"] in line["prompt"]
    shown = (run / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in shown]
    assert [sample["step"] for sample in samples] == [0] * 3 + [2] * 3 + [4] * 3
    assert ["Hello, you" in s["prompt"] for s in samples] == [True, False, False] * 3
    # with answers, the best is what answers best
    assert result["best_metric"] == max(entry["eval_rouge-l"] for entry in evaluations[1:])
    again = replace(
        answering, resume_from_checkpoint=str(run / "checkpoint-2"), eval_on_start=False
    )
    train(again)
    lines = (run / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0] * 3 + [2] * 3 + [4] * 3


def scripted(monkeypatch: pytest.MonkeyPatch, name: str, values: dict[int, float]) -> None:
    """Lets each evaluation find what was written down for its step."""

    def evaluate(self: Any, model: Any, batches: Any, step: int) -> tuple[dict[str, float], int]:
        return {"loss": 1.0, "token_acc": 0.5, name: values[step]}, 1

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("name", "best"), [("eval_loss", 2), ("token_acc", 4), ("eval_perplexity", 2)]
)
def test_the_best_checkpoint_is_the_best_that_was_evaluated_and_saved(
    model: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    best: int,
) -> None:
    values = {1: 0.9, 2: 0.2, 3: 0.1, 4: 0.7, 5: 0.8, 6: 0.6}
    scripted(monkeypatch, name.removeprefix("eval_"), values)
    config = config_of(
        model,
        sums,
        tmp_path,
        split_dataset_ratio=0.2,
        per_device_train_batch_size=16,
        max_steps=6,
        eval_steps=1,
        save_steps=2,
        save_total_limit=2,
        metric_for_best_model=name,
        load_best_model_at_end=True,
    )
    result = train(config)
    assert result["best_metric"] == values[best]
    assert Path(result["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert json.loads((tmp_path / "result.json").read_text())["best_metric"] == values[best]
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_run_that_gets_no_better_stops_saved(
    model: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # better, better, not by enough, worse, worse
    scripted(monkeypatch, "loss", {1: 0.9, 2: 0.5, 3: 0.49, 4: 0.6, 5: 0.7, 6: 0.1, 7: 0.1, 8: 0.1})
    config = config_of(
        model,
        sums,
        tmp_path / "run",
        split_dataset_ratio=0.2,
        per_device_train_batch_size=16,
        max_steps=8,
        eval_steps=1,
        save_steps=4,
        early_stop_interval=3,
        early_stopping_threshold=0.02,
    )
    result = train(config)
    assert result["global_step"] == 5
    assert Path(result["last_model_checkpoint"]).is_dir()
    assert (result["best_metric"], Path(result["best_model_checkpoint"]).name) == (
        0.6,
        "checkpoint-4",
    )
    # a resumed run counts on
    again = replace(
        config,
        output_dir=str(tmp_path / "again"),
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"),
    )
    assert train(again)["global_step"] == 5


def test_an_improvement_is_more_than_the_threshold() -> None:
    nan = math.nan
    cases: list[tuple[list[float], bool, float, int]] = [
        ([], False, 0.0, 0),
        ([3.0, 2.0, 1.0], False, 0.0, 0),
        ([3.0, 3.0, 3.0], False, 0.0, 2),
        ([1.0, 2.0, 3.0], True, 0.0, 0),
        ([3.0, 2.95, 2.85], False, 0.1, 0),
        ([3.0, 2.95, 2.91], False, 0.1, 2),
        ([3.0, nan, nan], False, 0.0, 2),
        ([nan, 3.0], False, 0.0, 0),
    ]
    for values, greater, threshold, expected in cases:
        assert without_improvement(values, greater=greater, threshold=threshold) == expected


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "epoch"}, [4, 8, 12]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8, 12]),
        ({"eval_steps": 5}, [5, 10, 12]),
        ({"eval_steps": 5, "eval_delay": 6, "eval_on_start": True}, [0, 10, 12]),
        ({"eval_strategy": "no"}, []),
    ],
    ids=str,
)
def test_a_run_is_evaluated_when_it_was_asked_to_be(
    model: Path, sums: Path, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    config = config_of(
        model,
        sums,
        tmp_path,
        split_dataset_ratio=0.01,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        save_steps=12,
        **settings,
    )
    result = train(config)
    assert [e["step"] for e in result["log_history"] if "eval_loss" in e] == steps
    held_out = config.eval_strategy != "no"
    assert (result["data"]["split_examples"] < 64) == held_out
    assert (result["best_metric"] is not None) == held_out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"metric_for_best_model": "eval_token_ac"},
            "expected one of loss, perplexity, token_acc; did you",
        ),
        ({"metric_for_best_model": "rouge-l"}, "rouge-l is unknown"),
        ({"greater_is_better": True}, "--greater_is_better true contradicts .* lower is better"),
    ],
)
def test_a_wrong_metric_is_said_before_anything_is_written(
    model: Path, sums: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = config_of(model, sums, tmp_path / "run", split_dataset_ratio=0.2, **settings)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split_dataset_ratio": 0, "eval_on_start": True},
            "eval_on_start has no effect without evaluation rows",
        ),
        ({"eval_strategy": "no", "eval_on_start": True}, "leave out --eval_strategy no"),
        ({"eval_strategy": "no", "split_dataset_ratio": 0.2}, "split_dataset_ratio has no effect"),
        ({"eval_strategy": "no", "val_dataset": ["a"]}, "val_dataset has no effect"),
        ({"eval_strategy": "epoch", "eval_steps": 3}, "eval_steps has no effect without"),
        ({"max_new_tokens": 3}, "max_new_tokens has no effect without --predict_with_generate"),
        ({"predict_rows": 3}, "predict_rows has no effect"),
        (
            {"predict_with_generate": True, "top_p": 0.5},
            "top_p has no effect without --temperature",
        ),
        ({"early_stopping_threshold": 0.1}, "has no effect without --early_stop_interval"),
        ({"sample_prompts": ["a"], "num_sample_generations": 0}, "sample_prompts has no effect"),
        ({"predict_with_generate": True, "predict_rows": 0}, "predict_rows 0 is out of range"),
        ({"early_stop_interval": 0}, "early_stop_interval 0 is out of range"),
    ],
)
def test_a_setting_without_effect_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="m", dataset=["d"], **settings)


def test_rows_without_a_question_cannot_be_answered(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"A plain text {n}."}) for n in range(8)))
    config = config_of(
        model, texts, tmp_path / "run", val_dataset=[str(texts)], num_sample_generations=2
    )
    with pytest.raises(ConfigError, match="no evaluation row has a question"):
        train(config)


def test_an_evaluation_that_is_not_finite_names_its_rows(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.from_pretrained(model)
    lines = rows.read_text(encoding="utf-8").splitlines()
    val = tmp_path / "val.jsonl"
    val.write_text("\n".join(lines[:6]), encoding="utf-8")
    ids = [set(encoder.encode(line).input_ids.tolist()) for line in lines]
    rare = min(ids[3] - set().union(*ids[:3], *ids[4:]))
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    poisoned = tmp_path / "poisoned"
    net.config.tie_word_embeddings = False
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach().clone())
    net.model.embed_tokens.weight.data[rare] = math.inf
    net.save_pretrained(poisoned)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (poisoned / name).write_bytes((model / name).read_bytes())
    config = config_of(
        poisoned,
        rows,
        tmp_path / "run",
        dataset=[f"{rows}"],
        val_dataset=[str(val)],
        eval_on_start=True,
        max_steps=1,
        on_non_finite="raise",
    )
    with pytest.raises(NonFiniteError, match=rf"evaluation after step 0.* 1 rows.*{val}:4;"):
        train(config)
