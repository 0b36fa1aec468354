"""Prompts to answers, several at a time.

In come token ids of prompts, out come those of the answers, without the token that ends them. Prompts of like length
are answered together, padded on the left; which ones share a batch does not change what the likeliest answer is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sftcore.config.generation import GenerationConfig as Settings
from sftcore.data import Encoder
from sftcore.models.stops import stops_of


def generation_config(encoder: Encoder, settings: Settings, *folders: Path) -> GenerationConfig:
    """Returns how Transformers generates: up to a token that the encoder or the files of the model name as an end.

    Args:
        encoder: Knows the tokens that end an answer, and the folder that it was read from.
        settings: How answers are drawn.
        folders: More folders with a generation_config.json or a config.json, as of a base model.

    Raises:
        ConfigError: Such a file is damaged.
    """
    stops = set(encoder.stop_token_ids)
    for folder in (encoder.folder, *folders):
        stops.update(stops_of(folder))
    draws: dict[str, Any] = {}
    if settings.temperature > 0:
        names = ("temperature", "top_p", "top_k")
        draws = {name: getattr(settings, name) for name in names}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=sorted(stops) or None,
        pad_token_id=encoder.pad_token_id,
        use_cache=True,
        **draws,
    )


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """A block in which a model has no settings of generation, so that `save_pretrained` cannot refuse to save them.

    Transformers refuses those that contradict one another, which published models have; the model's own file is kept
    as it is by `write_generation_config`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    seed: int,
) -> list[list[int]]:
    """Returns the token ids of the answers, in the order of the prompts.

    Random numbers are drawn from `seed` and the generators are put back afterwards, so that a training run
    goes on as if nothing had been generated.

    Args:
        model: In evaluation mode.
        prompts: Token ids, none empty.
        config: How to generate.
        batch_size: Prompts of a batch.
        seed: Decides the draws.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            found = _generate_batch(model, [prompts[number] for number in numbers], config, device)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
    return answers


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, device: torch.device
) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), int(config.pad_token_id or 0))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=within_positions(model, config, longest),
    )
    stops = config.eos_token_id or []
    return [_until(answer, stops) for answer in output[:, longest:].tolist()]


def within_positions(model: Any, config: GenerationConfig, prompt: int) -> GenerationConfig:
    """Returns settings whose answers end with the positions of the model.

    Args:
        model: Knows how many there are.
        config: How to generate.
        prompt: The tokens of the longest prompt.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or prompt + config.max_new_tokens <= limit:
        return config
    shorter = copy.deepcopy(config)
    shorter.max_new_tokens = max(1, limit - prompt)
    return shorter


def _until(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Returns the ids before the first that ends an answer."""
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0]] if ends else ids
