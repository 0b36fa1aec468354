"""A model split into stages: every layer in one of them, nearly equal, and together they are the model."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.distributed.pipeline import PipelineEngine
from sftcore.train.distributed.stages import KINDS, split_layers, stage_class
from sftcore.train.distributed.world import World

LAYERS = 5
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(("before", "behind"), [(0, 0), (7, 0), (3, 9), (100, 100)])
def test_no_other_split_has_a_smaller_largest_stage(
    num_stages: int, before: int, behind: int
) -> None:
    costs = [3, 1, 4, 1, 5, 9, 2]
    split = split_layers(costs, num_stages, before=before, behind=behind)
    assert list(itertools.chain(*split.layers)) == list(range(len(costs)))
    assert all(len(layers) for layers in split.layers)
    assert sum(split.parameters) == sum(costs) + before + behind
    costs[0] += before
    costs[-1] += behind
    least = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *borders, len(costs)]))
        for borders in itertools.combinations(range(1, len(costs)), num_stages - 1)
    )
    assert max(split.parameters) == least


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model has 2 layers"):
        split_layers([1, 1], 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_stages_one_behind_the_other_are_the_model(
    tmp_path: Path, kind: str, is_tied: bool
) -> None:
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=is_tied)
    whole = transformers.AutoModelForCausalLM.from_config(settings).eval()
    whole.save_pretrained(tmp_path)
    stages: list[Any] = [
        stage_class(type(whole), 3, number).from_pretrained(tmp_path).eval() for number in range(3)
    ]
    ids = torch.arange(3, 27).reshape(2, 12)
    # two examples share the first row
    positions = torch.tensor([[*range(7), *range(5)], [*range(12)]])
    with torch.no_grad():
        hidden = {"input_ids": ids}
        for stage in stages:
            stage.parts.check_passes()
            assert not any(p.is_meta for p in stage.parameters())
            assert not any(buffer.is_meta for buffer in stage.buffers())
            decoder = stage.base_model
            output = decoder(**hidden, position_ids=positions, use_cache=False)
            hidden = {"inputs_embeds": output.last_hidden_state}
        expected = whole.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        head = stages[-1].get_output_embeddings()
        logits = head(hidden["inputs_embeds"])
    assert torch.equal(hidden["inputs_embeds"], expected.last_hidden_state)
    assert torch.equal(logits, whole.get_output_embeddings()(expected.last_hidden_state))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    shared = [whole.base_model_prefix + ".embed_tokens.weight"] if is_tied else []
    assert sorted(names) == sorted([name for name, _ in whole.named_parameters()] + shared)
    # what a rank holds is what the split says of it
    held = [sum(p.numel() for p in stage.parameters()) for stage in stages]
    assert tuple(held) == stages[0].parts.split.parameters


def test_all_names_are_there_while_a_tuner_looks(tmp_path: Path) -> None:
    settings = transformers.AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    whole = transformers.AutoModelForCausalLM.from_config(settings)
    whole.save_pretrained(tmp_path)
    for number in range(3):
        stage = stage_class(type(whole), 3, number).from_pretrained(tmp_path)
        before = [name for name, _ in stage.named_parameters()]
        with stage.parts.all_modules():
            names = [name for name, _ in stage.named_parameters()]
            assert names == [name for name, _ in whole.named_parameters()]
        assert [name for name, _ in stage.named_parameters()] == before


@pytest.mark.parametrize("kind", ["granite", "gpt2", "qwen3_moe"])
def test_other_models_are_refused_with_what_splits_them(model: Path, rows: Path, kind: str) -> None:
    config = TrainConfig(model=str(model), dataset=[str(rows)], pipeline_parallel_size=2)
    engine = PipelineEngine(config, World(size=2, model_parallel_size=2))
    with pytest.raises(ConfigError, match=f"not {kind}; take --fsdp or --deepspeed zero3"):
        engine.meet(SimpleNamespace(model_type=kind))


def test_a_decoder_that_does_more_than_its_layers_is_refused(tmp_path: Path) -> None:
    settings = transformers.AutoConfig.for_model(
        "granite", **SIZES, embedding_multiplier=2.0, tie_word_embeddings=False
    )
    whole = transformers.AutoModelForCausalLM.from_config(settings)
    whole.save_pretrained(tmp_path)
    stage = stage_class(type(whole), 2, 1).from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="outside of its layers"):
        stage.parts.check_passes()
