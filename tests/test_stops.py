"""What ends an answer is saved with a tuned model: it stops by itself wherever plain Transformers runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from sftcore.config import InferConfig, MergeConfig
from sftcore.data import Encoder
from sftcore.errors import ConfigError
from sftcore.export import merge
from sftcore.infer import infer
from sftcore.models.generation import generation_config
from sftcore.models.stops import stops_of, write_generation_config
from sftcore.train import train
from stopping_models import (
    ENDINGS,
    MOST_TOKENS,
    answer_of,
    make_model,
    make_rows,
    plain_model,
    stops_in,
    tune_config,
)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("name", ENDINGS)
def test_a_tuned_model_stops_by_itself_where_the_base_did_not(
    name: str, tuner: str, shared_data: Path, tmp_path: Path
) -> None:
    ending = ENDINGS[name]
    base = make_model(tmp_path / "base", ending, shared_data / "tokenizers")
    rows = make_rows(tmp_path / "rows.jsonl", turns=len(ending.says))
    config = tune_config(base, ending, rows, tmp_path / "run", tuner_type=tuner)
    checkpoint = Path(train(config)["last_model_checkpoint"])
    encoder = Encoder.from_pretrained(checkpoint)
    wanted = {encoder.token_id(token) for token in ending.stops}
    folders = [checkpoint]
    if tuner == "lora":
        output = str(tmp_path / "merged")
        folders.append(merge(MergeConfig(adapters=str(checkpoint), output_dir=output)))
    for folder in folders:
        stops = stops_in(folder)
        assert stops[0] == encoder.eos_token_id
        assert wanted <= set(stops)
    for turn, said in enumerate(ending.says):
        assert len(answer_of(base, base, chat=checkpoint, turn=turn)) == MOST_TOKENS
        for folder in folders:
            answer = answer_of(folder, base, turn=turn)
            assert encoder.decode(answer, skip_special_tokens=False) == said
            # what stops it is the saved file, where the base has another end
            with_old = answer_of(folder, base, stops=base, turn=turn)
            assert (len(with_old) > len(answer)) == (answer[-1] not in stops_in(base))
    where = {"adapters" if tuner == "lora" else "model": str(checkpoint)}
    answers = infer(InferConfig(prompt="say 3", max_new_tokens=MOST_TOKENS, **where))
    assert answers[0]["response"].strip().endswith("so")


def inconsistent(folder: Path) -> dict[str, Any]:
    """A file of a model that Transformers refuses to save where it was changed."""
    values = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [5, 7],
        "something_of_its_own": {"kept": True},
    }
    (folder / "generation_config.json").write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_other_fields_are_kept_as_they_are_also_where_they_contradict_one_another(
    tuner: str, shared_data: Path, tmp_path: Path
) -> None:
    ending = ENDINGS["a token that is not its eos"]
    base = make_model(tmp_path / "base", ending, shared_data / "tokenizers")
    own = inconsistent(base)
    rows = make_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {"max_steps": 2, "tuner_type": tuner, "split_dataset_ratio": 0.2}
    if tuner == "full":
        settings["load_best_model_at_end"] = True
    result = train(tune_config(base, ending, rows, tmp_path / "run", **settings))
    folders = [Path(result["last_model_checkpoint"])]
    if tuner == "lora":
        adapters = result["last_model_checkpoint"]
        folders.append(merge(MergeConfig(adapters=adapters, output_dir=str(tmp_path / "merged"))))
    else:
        folders.append(tmp_path / "run")  # the copy of the best
    for folder in folders:
        found = json.loads((folder / "generation_config.json").read_text())
        assert found == {**own, "eos_token_id": [5, 7, 0, 2]}


def test_a_model_without_the_file_gets_a_minimal_one(tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 9, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = tmp_path / "target"
    target.mkdir()
    write_generation_config(target, home=tmp_path, trained=[2])
    found = json.loads((target / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": 2}
    write_generation_config(target, home=tmp_path, trained=[4, 2, 3])
    assert stops_in(target) == [2, 4, 3]


def test_inference_stops_where_any_file_of_the_model_says(
    shared_data: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", ENDINGS["own token"], shared_data / "tokenizers")
    (base / "generation_config.json").write_text('{"eos_token_id": [11, 12]}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"text_config": {"eos_token_id": 13}}')
    encoder = Encoder.from_pretrained(base, template="chatml")
    found = generation_config(encoder, InferConfig(model="m"), other)
    assert found.eos_token_id == [2, 11, 12, 13]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}']
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        stops_of(tmp_path)


def test_the_plain_loader_of_these_tests_reads_the_saved_file_alone(
    shared_data: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", ENDINGS["own token"], shared_data / "tokenizers")
    model = plain_model(base, base)
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        assert model(torch.tensor([[1, 2]])).logits.shape[-1] == model.config.vocab_size
    assert isinstance(model, transformers.LlamaForCausalLM)
