"""The page of all shared templates: its script runs, and the committed page is what it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent_rows import ROWS
from conftest import REPOSITORY
from native_tokenizers import NativeTokenizers
from template_table import COLUMNS, FAMILIES, Line, faults, make_lines, page, reasons, table_line

SOME = (
    "GLM-4.6",
    "Qwen-Qwen3-0.6B",
    "SmolLM2-135M-Instruct",
    "deepseek-ai-DeepSeek-V3.1",
    "hfjs-LiquidAI-LFM2.5-VL-450M",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meetkai-functionary-medium-v3.1",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
    "vllm-template_chatml",
)


@pytest.fixture(scope="module")
def committed() -> str:
    return (REPOSITORY / "docs" / "template-table.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lines(shared_data: Path) -> dict[str, Line]:
    pytest.importorskip("transformers")
    if not (shared_data.parent / "cases").is_dir():
        pytest.skip(f"needs the shared cases ({shared_data.parent / 'cases'})")
    return {line.name: line for line in make_lines(shared_data, SOME)}


@pytest.mark.parametrize("name", SOME)
def test_the_committed_page_is_in_step(lines: dict[str, Line], committed: str, name: str) -> None:
    line = lines[name]
    if not line.problem:
        assert table_line(line) in committed.splitlines()
    explained = reasons([line])
    assert explained in committed
    assert (f"- {name}," in explained) == (f"- {name}," in committed.split("## Counts")[0])


def test_the_page_says_what_is_wrong_and_what_is_refused(lines: dict[str, Line]) -> None:
    made = page(list(lines.values()))
    assert "10 templates, 9 usable" in made
    assert "functionary-medium-v3.1, all: the chat template does not compile" in made
    broken = Line("broken", cells=dict.fromkeys(COLUMNS, "yes"))
    broken.refused["call"] = "cannot tell"
    broken.wrong["the header of a turn is trained"].append("first")
    made = page([broken])
    assert "- broken, call: cannot tell" in made
    assert "- broken, first: the header of a turn is trained" in made


def test_no_plain_row_of_a_known_family_is_refused(shared_data: Path, committed: str) -> None:
    rows = dict(re.findall(r"^\| ([\w-]+) \| \d+ \| (\d+) \| \d+ \|$", committed, re.MULTILINE))
    assert rows == dict.fromkeys(FAMILIES, "0")
    templates = {path.stem for path in (shared_data / "templates").glob("*.jinja")}
    named = set(re.findall(r"^\| (\S+) \| [`nc].*\|$", committed, re.MULTILINE))
    assert templates - named == {"meetkai-functionary-medium-v3.1"}


def test_a_wrong_mask_is_found(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "templates" / "Qwen-Qwen3-0.6B.jinja"
    source = path.read_text(encoding="utf-8")
    encoder = NativeTokenizers(shared_data, tmp_path / "work", path.parent).encoder(source, path)
    row = ROWS["calls in turn"]
    example = encoder.encode(row)
    encoded = example.text.encode()
    right = [encoded[start:end].decode() for start, end, trained in example.segments if trained]

    def found(trained: list[str]) -> set[str]:
        return set(faults(encoder, row, example.text, trained, "<|im_end|>"))

    assert found(right) == set()
    assert found(right[1:]) == {"words of the assistant are not trained"}
    assert found([*right, "1 degrees"]) == {"words of tool are trained"}
    assert found([f"<|im_start|>assistant\n{right[0]}", *right[1:]]) == {
        "the header of a turn is trained"
    }
    assert found([*right, "the words of a task " * 10]) == {"words of the template are trained"}
