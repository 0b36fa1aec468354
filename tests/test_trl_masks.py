"""Spans that are found beside those that TRL's own training templates tag: what differs is known and judged.

`docs/templates.md` says of each kind who is right and why. The templates are those of TRL's package where it is
installed, or of the folder that SFTCORE_TRL_TEMPLATES names (`make masks`).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from trl_masks import Comparison, run, table

BREAK = r"TRL alone trains '\n' after a turn"
BREAK_AND_EOS = r"TRL alone trains '\n<eos>' after a turn"
HEADER_BREAK = r"TRL alone trains '\n' before a turn"
ASSISTANT = {
    "TRL alone trains '<｜Assistant｜>' before a turn",
    "TRL alone trains '<｜Assistant｜>' between two turns",
    "TRL alone trains '<｜tool▁outputs▁end｜>' before a turn",
}
START = {
    "TRL alone trains '<|start|>assistant' before a turn",
    "TRL alone trains '<|start|>assistant' between two turns",
}
THINK = r"TRL alone trains '<think>\n' before a turn"
NO_THOUGHT = r"TRL alone trains '<think>\n\n</think>\n\n' before a turn"
NEMOTRON_THINK = {
    THINK,
    "TRL alone trains '<think>' before a turn",
    "TRL alone trains '<think></think>' before a turn",
}
CALLS = "calls go in as text here"
PARTS = "parts go in as text here"
EMPTY = "refused: nothing of a turn is in the text"
OTHER = "the training template writes another text"
FAILS = "the training template renders, the other fails"

JUDGED: dict[str, set[str]] = {
    "cohere": {CALLS},
    "cohere2": {CALLS, PARTS, OTHER},
    "deepseek_r1_distill": {
        *ASSISTANT,
        r"TRL alone trains '<｜Assistant｜><think>\n' before a turn",
        EMPTY,
        OTHER,
    },
    "deepseekv3": {*ASSISTANT, HEADER_BREAK, OTHER, FAILS},
    "diffusion_gemma": {BREAK, "here alone trains '<|tool_response>' after a turn"},
    "gemma": {BREAK, CALLS, PARTS},
    "gemma3": {BREAK, CALLS},
    "glm4moe": {r"TRL alone trains '\n<think></think>' before a turn", OTHER},
    "gptoss": START,
    "idefics3": {BREAK, EMPTY},
    "lfm2": {BREAK, CALLS, PARTS},
    "lfm2_2_5": {BREAK},
    "lfm2_2_5_v2": {BREAK},
    "lfm2_2_5_vl": {BREAK},
    "lfm2_v2": {BREAK, PARTS},
    "llama3": {CALLS, PARTS},
    "llava_next": set(),
    "muse_glimmer": START,
    "nemotron_3_5_lightning": {*NEMOTRON_THINK, BREAK, PARTS},
    "nemotron_3_nano": {*NEMOTRON_THINK, BREAK, PARTS},
    "nemotron_3_super": {*NEMOTRON_THINK, BREAK, PARTS},
    "nemotron_3_ultra": {*NEMOTRON_THINK, BREAK, PARTS},
    "phi3": {BREAK, BREAK_AND_EOS, CALLS},
    "phi3_5": {BREAK, BREAK_AND_EOS, CALLS},
    "qwen2_5": {BREAK, HEADER_BREAK},
    "qwen2_5_vl": {BREAK, CALLS},
    "qwen3": {BREAK, NO_THOUGHT, PARTS, OTHER},
    "qwen3_5_nothink": {BREAK, THINK, NO_THOUGHT, OTHER},
    "qwen3_5_think": {BREAK, THINK, NO_THOUGHT, OTHER},
    "qwen3_6": {BREAK, THINK, NO_THOUGHT, OTHER},
    "qwen3_8": {BREAK, THINK, NO_THOUGHT},
    "qwen3_instruct_2507": {BREAK, PARTS},
    "qwen3_vl": {BREAK},
    "smolvlm": {BREAK, EMPTY},
}


@pytest.fixture(scope="module")
def comparisons(shared_data: Path) -> dict[str, Comparison]:
    pytest.importorskip("transformers")
    given = os.environ.get("SFTCORE_TRL_TEMPLATES")
    package = importlib.util.find_spec("trl")
    if given is None and (package is None or not package.submodule_search_locations):
        pytest.skip("needs TRL's templates: make masks, or SFTCORE_TRL_TEMPLATES")
    folder = Path(given or Path(package.submodule_search_locations[0]) / "chat_templates")
    return {found.name: found for found in run(folder, shared_data)}


@pytest.mark.parametrize("name", JUDGED)
def test_spans_differ_from_trls_as_judged_alone(
    comparisons: dict[str, Comparison], name: str
) -> None:
    found = comparisons[name]
    assert set(found.kinds) == JUDGED[name]
    assert found.rows >= 2
    assert found.equal <= found.near <= found.rows


def test_every_training_template_is_judged(comparisons: dict[str, Comparison]) -> None:
    assert set(comparisons) == set(JUDGED)
    lines = table(list(comparisons.values())).splitlines()
    assert len(lines) == 2 + sum(1 + len(found.kinds) for found in comparisons.values())
