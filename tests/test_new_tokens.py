"""Control tokens that a tokenizer lacks: said, added, trained alone beside an adapter, and there wherever it runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from peft import PeftModel
from safetensors.torch import load_file

from sftcore.config import InferConfig, MergeConfig, TrainConfig
from sftcore.data import Encoder
from sftcore.data.control_tokens import control_tokens, unknown_tokens_warning
from sftcore.errors import ConfigError
from sftcore.export import merge
from sftcore.infer.generate import Chat
from sftcore.models.new_tokens import NewTokens, add_tokens, extend_embedding, names_to_add
from sftcore.train import train
from sftcore.train.distributed import World, choose_engine
from stopping_models import ENDINGS, make_model, make_rows, plain_model, tune_config
from tiny_runs import contents

ENDING = ENDINGS["new special token"]
IDS = torch.tensor([[50257, 500, 501, 50258, 502]])


def encoder_of(shared_data: Path, tokenizer: str, template: str = "auto") -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / tokenizer, template=template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chatml", ["<|im_start|>", "<|im_end|>"]),
        ("gemma", ["<|endoftext|>", "<end_of_turn>", "<start_of_turn>"]),
        ("phi", ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]),
        # what they write in brackets is text
        ("llama2", ["<|endoftext|>"]),
        ("mistral", ["<|endoftext|>"]),
        ("qwen3", ["<|im_start|>", "<|im_end|>"]),
    ],
)
def test_control_tokens_are_those_that_a_template_writes_around_contents(
    template: str, expected: list[str], shared_data: Path
) -> None:
    found = control_tokens(encoder_of(shared_data, "gpt2", template), with_calls=False)
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    "tokenizer", ["qwen3", "smollm2", "minimind", "llama2", "gemma4", "deepseek-v3", "phi-3-mini"]
)
def test_a_model_with_its_own_template_is_not_warned_of(tokenizer: str, shared_data: Path) -> None:
    assert unknown_tokens_warning(encoder_of(shared_data, tokenizer)) is None


def test_tokens_in_pieces_are_named_before_the_first_step(shared_data: Path) -> None:
    warning = unknown_tokens_warning(encoder_of(shared_data, "gpt2", "chatml"))
    assert warning is not None
    assert "<|im_start|> (" in warning
    assert "<|im_end|> (" in warning
    assert "--new_special_tokens template" in warning


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama2", "qwen3"])
def test_a_tokenizer_with_more_tokens_is_that_of_transformers(
    tokenizer: str, shared_data: Path, tmp_path: Path
) -> None:
    encoder = encoder_of(shared_data, tokenizer, "chatml")
    added = ["<|one|>", "<|two|>"]
    new = add_tokens(encoder, added, tmp_path / "mine")
    theirs = transformers.AutoTokenizer.from_pretrained(encoder.folder)
    before = len(theirs)
    theirs.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    assert new == NewTokens(
        ids=dict(zip(added, theirs.convert_tokens_to_ids(added), strict=True)), num_known=before
    )
    text = "say <|one|>it<|two|> so, <|three|>"
    mine = Encoder.from_pretrained(tmp_path / "mine")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert mine.tokenize(text).tolist() == ids
    assert saved(text, add_special_tokens=False)["input_ids"] == ids
    assert "<|one|>" not in saved.decode(ids, skip_special_tokens=True)
    assert mine.render([{"role": "user", "content": "a"}]) == "<|im_start|>user\na<|im_end|>\n"


def test_names_that_are_known_are_told_apart(shared_data: Path) -> None:
    encoder = encoder_of(shared_data, "gpt2", "chatml")
    assert names_to_add(encoder, ["<|x|>", "<|endoftext|>"]) == (["<|x|>"], ["<|endoftext|>"])
    found, known = names_to_add(encoder, ["template", "<|im_end|>"])
    assert (sorted(found), known) == (["<|im_end|>", "<|im_start|>"], [])


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_new_rows_start_at_the_mean_and_the_old_ones_stay(ties: bool, padded: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=ties,
    )
    model = transformers.LlamaForCausalLM(config)
    known = 90 if padded else 100
    before = [
        module.weight.detach().clone()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    new = NewTokens(ids={"<|a|>": known, "<|b|>": known + 1}, num_known=known)
    extend_embedding(model, new)
    assert model.config.vocab_size == (100 if padded else 128)
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    assert (modules[0].weight is modules[1].weight) == ties
    for old, module in zip(before, modules, strict=True):
        assert torch.equal(module.weight[:known], old[:known])
        assert torch.allclose(module.weight[new.rows], old[:known].mean(0).expand(2, 8))
        assert torch.equal(module.weight[known + 2 : 100], old[known + 2 :])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, TrainConfig]:
    """A base model, the folder of a run of four steps with LoRA, and its settings."""
    folder = tmp_path_factory.mktemp("run")
    base = make_model(folder / "base", ENDING, shared_data / "tokenizers", ties=request.param)
    rows = make_rows(folder / "rows.jsonl")
    config = tune_config(
        base,
        ENDING,
        rows,
        folder / "run",
        max_steps=4,
        save_steps=2,
        save_total_limit=0,
        lora_dropout=0.2,
    )
    train(config)
    return base, folder / "run", config


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def test_the_new_rows_alone_are_trained_and_saved(run: tuple[Path, Path, TrainConfig]) -> None:
    base, folder, _ = run
    state = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    rows = {name: value for name, value in state.items() if "lora_" not in name}
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert len(rows) == (1 if is_tied else 2)
    for name, value in rows.items():
        assert name.endswith("token_adapter.trainable_tokens_delta")
        assert value.shape == (2, 64)
        assert not torch.allclose(value[0], value[1], atol=1e-4)


def test_merged_equals_unmerged_equals_inference(
    run: tuple[Path, Path, TrainConfig], tmp_path: Path
) -> None:
    base, folder, _ = run
    checkpoint = folder / "checkpoint-4"
    merged = merge(MergeConfig(adapters=str(checkpoint), output_dir=str(tmp_path / "merged")))
    plain = logits_of(plain_model(merged, merged))
    chat = Chat(InferConfig(adapters=str(checkpoint)))
    assert (logits_of(chat.model) - plain).abs().max() < 1e-4
    # PEFT by hand: rows that pad the embedding are of no token, and each library fills them its own way
    known = slice(0, 50259)
    unmerged = logits_of(plain_model(checkpoint, base))
    assert isinstance(plain_model(checkpoint, base), PeftModel)
    assert (unmerged[..., known] - plain[..., known]).abs().max() < 1e-4
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert model.config.vocab_size == 50304
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert (head.weight is embedding.weight) == is_tied
    assert not (merged / "new_tokens.json").exists()


def test_a_run_goes_on_exactly(run: tuple[Path, Path, TrainConfig], tmp_path: Path) -> None:
    _, folder, config = run
    settings = config.to_dict() | {
        "output_dir": str(tmp_path / "gone-on"),
        "resume_from_checkpoint": str(folder / "checkpoint-2"),
    }
    train(TrainConfig(**settings))
    found, expected = (contents(home / "checkpoint-4") for home in (tmp_path / "gone-on", folder))
    assert found == expected


def test_other_tokens_cannot_be_gone_on_with(
    run: tuple[Path, Path, TrainConfig], tmp_path: Path
) -> None:
    _, folder, config = run
    settings = config.to_dict() | {
        "output_dir": str(tmp_path / "gone-on"),
        "resume_from_checkpoint": str(folder / "checkpoint-2"),
        "new_special_tokens": ["<|im_end|>"],
    }
    with pytest.raises(ConfigError, match=r"--new_special_tokens is .* and was template"):
        train(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner_type": "vera"}, "--new_special_tokens has no effect without --tuner_type lora"),
        ({"new_special_tokens": ["<|a|>", "<|a|>"]}, "names <|a|> twice"),
        ({"new_special_tokens": [" a"]}, "begins or ends with white space"),
        ({"target_modules": ["all-linear", "EMBEDDING"]}, "an adapter on model.embed_tokens"),
        (
            {"tuner_type": "freeze", "lora_dropout": 0.05, "freeze_parameters": ["model.embed"]},
            "needs model.embed_tokens to be trained",
        ),
    ],
)
def test_what_cannot_be_is_said(
    settings: dict[str, Any], message: str, shared_data: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", ENDING, shared_data / "tokenizers")
    rows = make_rows(tmp_path / "rows.jsonl", count=2)
    with pytest.raises(ConfigError) as caught:
        train(
            tune_config(base, ENDING, rows, tmp_path / "run", **{"lora_dropout": 0.05, **settings})
        )
    assert message in str(caught.value)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"tensor_parallel_size": 2, "tuner_type": "lora"},
        "--tensor_parallel_size and an adapter",
        "--fsdp",
    ),
    ({"pipeline_parallel_size": 2}, "--pipeline_parallel_size", "--fsdp"),
    ({"device_map": "auto"}, "--device_map", "--fsdp"),
]
if importlib.util.find_spec("deepspeed") is not None:
    REFUSED += [
        ({"deepspeed": name, **tuner}, f"--deepspeed {name}", "--deepspeed zero2, or --fsdp")
        for name in ("zero3", "zero3_offload")
        for tuner in ({"tuner_type": "lora"}, {"tuner_type": "full"})
    ]


@pytest.mark.parametrize(("given", "named", "instead"), REFUSED)
def test_an_engine_that_cannot_train_new_rows_refuses_by_name(
    given: dict[str, Any], named: str, instead: str
) -> None:
    config = TrainConfig(model="m", dataset=["d"], new_special_tokens=["<|a|>"], **given)
    shared = config.pipeline_parallel_size * config.tensor_parallel_size
    world = World(size=shared, local_size=shared, model_parallel_size=shared)
    engine = choose_engine(config, world)
    with pytest.raises(ConfigError) as caught:
        engine.check_new_tokens()
    assert f"--new_special_tokens cannot be used with {named}" in str(caught.value)
    assert instead in str(caught.value)
