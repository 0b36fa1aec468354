"""Training: the losses of a plain loop, an exact resume, a merge that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from sftcore.config import InferConfig, MergeConfig
from sftcore.data import BatchLoader, Encoder
from sftcore.errors import ConfigError, RowError
from sftcore.export import merge
from sftcore.infer import infer
from sftcore.train import train
from training import config_of, losses


def plain_losses(
    model: Path,
    rows: Path,
    batch_size: int,
    accumulation: int,
    weights: Sequence[float] | None = None,
) -> list[float]:
    """An own loop: plain rows from Transformers, a plain collator, AdamW, a cosine with warm-up."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    examples = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = [{"role": "user", "content": row["question"]}]
        answer = {"role": "assistant", "content": row["answer"]}
        render = tokenizer.apply_chat_template
        prompt = render(question, add_generation_prompt=True, return_dict=False)
        ids = render([*question, answer], return_dict=False)
        # the template ends with a line break after the closing token, which is not trained
        examples.append((ids, [-100] * len(prompt) + ids[len(prompt) : -1] + [-100]))
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    encoder = Encoder.from_pretrained(model)
    loader = BatchLoader(
        rows, encoder, batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    order = list(loader.plan(0))
    decay = [p for n, p in net.named_parameters() if "norm" not in n]
    rest = [p for n, p in net.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    warmup = -(-len(order) // 20)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(order))
    history = []
    for global_batch in order:
        chosen = [examples[row] for row in global_batch]
        chosen_weights = [weights[row] if weights else 1.0 for row in global_batch]
        count = sum(label != -100 for _, labels in chosen for label in labels[1:])
        total = 0.0
        for weight, (ids, labels) in zip(chosen_weights, chosen, strict=True):
            logits = net(torch.tensor([ids])).logits[0, :-1]
            loss = weight * torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[1:]), reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach()) / count
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append(total)
    return history


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_equal_those_of_a_plain_loop(
    model: Path, rows: Path, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    result = train(
        config_of(
            model,
            rows,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
    )
    expected = plain_losses(model, rows, batch_size, accumulation)
    assert losses(result) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_weights_of_messages_weigh_their_losses(
    model: Path, rows: Path, tmp_path: Path, batch_size: int
) -> None:
    weights = [(0.5, 1.0, 3.0)[number % 3] for number in range(64)]
    weighted = tmp_path / "weighted.jsonl"
    with weighted.open("w", encoding="utf-8") as file:
        for line, weight in zip(
            rows.read_text(encoding="utf-8").splitlines(), weights, strict=True
        ):
            row = json.loads(line)
            question = {"role": "user", "content": row["question"]}
            answer = {"role": "assistant", "content": row["answer"], "weight": weight}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    config = config_of(
        model,
        weighted,
        tmp_path / "run",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=4,
    )
    expected = plain_losses(model, rows, batch_size, 4, weights)
    assert losses(train(config)) == pytest.approx(expected, rel=1e-4)


def test_evaluation_is_the_token_mean_of_the_held_out_rows(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    result = train(
        config_of(
            model,
            rows,
            tmp_path,
            split_dataset_ratio=0.2,
            tuner_type="lora",
            max_steps=2,
            per_device_eval_batch_size=5,
        )
    )
    shown = [float(entry["eval_loss"]) for entry in result["log_history"] if "eval_loss" in entry]
    assert result["best_metric"] == min(shown)
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    from peft import PeftModel

    net = PeftModel.from_pretrained(net, result["last_model_checkpoint"]).eval()
    loader = BatchLoader(rows, Encoder.from_pretrained(model), split="validation", split_ratio=0.2)
    total, count = 0.0, 0
    for batch in loader:
        number = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(net(**batch).loss) * number
        count += number
    assert shown[-1] == pytest.approx(total / count, rel=1e-4)


def test_a_run_writes_what_it_promises(
    model: Path, rows: Path, tmp_path: Path, pictures: Any
) -> None:
    config = config_of(model, rows, tmp_path, tuner_type="lora", max_steps=3, add_version=True)
    with pictures():
        result = train(config)
    run, best = Path(result["output_dir"]), Path(result["best_model_checkpoint"])
    assert run.parent == tmp_path / model.name
    assert run.name.startswith("v0-")
    for name in ("args.yaml", "logging.jsonl", "result.json", "images/loss.png"):
        assert (run / name).stat().st_size > 0
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "loader_state.json",
        "args.yaml",
    ):
        assert (best / name).stat().st_size > 0
    assert result["global_step"] == 3
    state = json.loads((best / "loader_state.json").read_text())
    assert (state["epoch"], state["step"]) == (0, 3)


def test_merged_weights_answer_like_the_adapter(model: Path, rows: Path, tmp_path: Path) -> None:
    result = train(config_of(model, rows, tmp_path / "run", tuner_type="lora", max_steps=4))
    checkpoint = result["best_model_checkpoint"]
    merged = merge(MergeConfig(adapters=checkpoint, output_dir=str(tmp_path / "merged")))
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, checkpoint).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = torch.tensor([tokenizer("The sea is")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, plain(ids).logits, atol=1e-4)
    assert tokenizer.chat_template == Encoder.from_pretrained(model).chat_template
    with pytest.raises(ConfigError, match="is not empty"):
        merge(MergeConfig(adapters=checkpoint, output_dir=str(tmp_path / "merged")))
    answers = [
        infer(InferConfig(prompt="2 + 2?", max_new_tokens=5, **where))[0]["response"]
        for where in ({"adapters": checkpoint}, {"model": str(merged)})
    ]
    assert answers[0] == answers[1]


def test_a_wrong_row_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": 3}')
    with pytest.raises(RowError):
        train(config_of(model, rows, tmp_path / "output"))
    assert not (tmp_path / "output").exists()


def test_a_file_of_prompts_is_answered_line_by_line(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"query": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    output = tmp_path / "answers.jsonl"
    config = InferConfig(
        model=str(model), prompts=str(prompts), output=str(output), max_new_tokens=3
    )
    infer(config)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["messages"][-1]["content"] for answer in answers] == ["a", "b"]


def test_a_stream_gives_the_same_text_as_the_whole_answer(model: Path) -> None:
    from sftcore.infer.generate import Chat

    chat = Chat(InferConfig(model=str(model), max_new_tokens=12, temperature=1.0))
    pieces: list[str] = []
    answer = chat.answer([{"role": "user", "content": "你好"}], on_text=pieces.append)
    assert "".join(pieces).strip() == answer


def test_training_takes_folders_columns_and_draws(model: Path, rows: Path, tmp_path: Path) -> None:
    from sftcore.train.distributed import World
    from sftcore.train.loaders import describe_data, open_loaders

    info, renamed = tmp_path / "info.json", tmp_path / "renamed.jsonl"
    renamed.write_text(rows.read_text(encoding="utf-8").replace('"question"', '"ask"'))
    info.write_text(json.dumps({"odd": {"files": str(renamed), "columns": {"ask": "query"}}}))
    config = config_of(
        model,
        rows,
        tmp_path,
        dataset=["odd#3", str(rows.parent)],
        dataset_info=[str(info)],
        mix=[0.5, 0.5],
        split_dataset_ratio=0.0,
    )
    loader, _ = open_loaders(config, Encoder.from_pretrained(model), World())
    assert [part["examples"] for part in loader.report["epoch"]] == [3, 3]
    assert "odd: 3 examples an epoch" in describe_data(loader, None)


def test_names_are_asked_for_just_where_they_are_taught(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftcore.train.datasets import find_sources

    monkeypatch.setenv("SFTCORE_CACHE", str(tmp_path / "cache"))
    names = {"model_name": ["Sofie"], "model_author": ["Pinecone Lab"]}
    config = config_of(model, rows, tmp_path, dataset=["self-cognition#5"], **names)
    (source,) = find_sources(config.dataset, config)
    assert source.sample == 5
    assert "Sofie" in source.files[0].read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="--dataset self-cognition needs --model_author"):
        find_sources(config.dataset, replace(config, model_author=[]))
    with pytest.raises(
        ConfigError, match="--model_name has no effect without --dataset self-cognition"
    ):
        find_sources([str(rows)], replace(config, dataset=[str(rows)]))
