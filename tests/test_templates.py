"""The packaged templates: the format of their family, and one exact text each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftcore.data import Encoder, load_template
from sftcore.errors import TemplateError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
# SmolLM2's tokenizer names these; in the texts below they are B and E
BOS, EOS = "<|im_start|>", "<|im_end|>"

# the real template of the family, and the conversations where ours goes its own way, with the reason
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "chatml": ("mistralrs-chatml", {"tools": "calls of tools become text"}),
    "llama2": ("mistralrs-llama2", {"tools": "refused by both"}),
    "llama3": ("unsloth-llama3_template", {"tools": "calls of tools become text"}),
    "qwen2.5": ("Qwen-Qwen2.5-7B-Instruct", {}),
    "qwen3": ("Qwen-Qwen3-0.6B", {}),
    "mistral": (
        "hfjs-mistralai-Mixtral-8x7B-Instruct-v0.1",
        {"system3": "a system message is refused there", "tools": "refused by both"},
    ),
    "gemma": (
        "google-gemma-2-2b-it",
        {"system3": "a system message is refused there", "tools": "refused by both"},
    ),
    "phi": ("microsoft-Phi-3.5-mini-instruct", {"tools": "results of tools are left out there"}),
    "deepseek": ("hfjs-deepseek-ai-deepseek-llm-7b-chat", {"tools": "refused by ours"}),
    "glm": ("GLM-4.6", {}),
    "zephyr": (
        "hfjs-HuggingFaceH4-zephyr-7b-beta",
        {"tools": "results of tools are left out there"},
    ),
    "vicuna": (
        "unsloth-vicuna_template",
        {
            "plain": "no default system there",
            "gen": "no default system there",
            "think": "the same",
            "tools": "refused",
        },
    ),
}

TEXTS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    "default": "Be brief.\n\n### Human:\nHi\n\n### Assistant:\nHello\n\n### Human:\n1+1?\n\n### Assistant:\n2{E}",
    "default-generation": "Be brief.HiHello{E}1+1?2{E}",
    "llama2": "{B}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello {E}{B}[INST] 1+1? [/INST] 2 {E}",
    "llama3": "{B}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>",
    "qwen2.5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Hello<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>\n",
    "mistral": "{B}[INST] Be brief.\n\nHi [/INST]Hello{E}[INST] 1+1? [/INST]2{E}",
    "gemma": "{B}<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    "<|user|>\n1+1?<|end|>\n<|assistant|>\n2<|end|>\n{E}",
    "deepseek": "{B}Be brief.\n\nUser: Hi\n\nAssistant: Hello{E}User: 1+1?\n\nAssistant: 2{E}",
    "glm": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\n<think></think>\nHello"
    "<|user|>\n1+1?<|assistant|>\n<think></think>\n2",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello{E}\n\n"
    "### Instruction:\n1+1?\n\n### Response:\n2{E}",
    "vicuna": "{B}Be brief. USER: Hi ASSISTANT: Hello{E}USER: 1+1? ASSISTANT: 2{E}",
    "zephyr": "<|system|>\nBe brief.{E}\n<|user|>\nHi{E}\n<|assistant|>\nHello{E}\n"
    "<|user|>\n1+1?{E}\n<|assistant|>\n2{E}\n",
}


def test_every_packaged_template_has_its_text() -> None:
    folder = Path(load_template.__code__.co_filename).parent.parent / "templates"
    assert {path.stem for path in folder.glob("*.jinja")} == set(TEXTS)


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Encoder:
    return Encoder.from_pretrained(shared_data / "tokenizers" / "smollm2")


@pytest.mark.parametrize("name", TEXTS)
def test_the_exact_text_and_what_is_trained(encoder: Encoder, name: str) -> None:
    text = TEXTS[name].replace("{B}", BOS).replace("{E}", EOS)
    template = encoder.with_template(name)
    example = template.encode(CHAT)
    assert example.text == text
    encoded = text.encode()
    said = [encoded[start:end].decode() for start, end, trained in example.segments if trained]
    assert len(said) == 2
    assert "Hello" in said[0]
    assert "2" in said[1]
    # what the generation prompt gives is not trained, and all that follows it is
    prompt = template.render(CHAT[:-1], add_generation_prompt=True)
    if text.startswith(prompt):
        assert text[len(prompt) :].startswith(said[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_format_of_the_family(shared_data: Path, encoder: Encoder, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(encoder.folder)
    file, left_out = FAMILIES[name]
    real = (shared_data / "templates" / f"{file}.jinja").read_text(encoding="utf-8")
    ours = load_template(name)
    contexts = json.loads((shared_data / "templates" / "contexts.json").read_text(encoding="utf-8"))
    contexts["system"] = {"messages": CHAT}
    contexts["ends with a question"] = {"messages": CHAT[:4], "add_generation_prompt": True}
    compared = 0
    for kind, context in contexts.items():
        if kind in left_out or kind == "parts":
            continue

        def render(source: str | None, context: Any = context) -> str:
            return oracle.apply_chat_template(
                context["messages"],
                tools=context.get("tools"),
                chat_template=source,
                add_generation_prompt=context.get("add_generation_prompt", False),
                tokenize=False,
            )

        try:
            want = render(real)
        except Exception:
            assert kind in ("system", "ends with a question"), kind
            continue
        row = {"messages": context["messages"], "tools": context.get("tools")}
        got = encoder.with_template(name).render(
            row, add_generation_prompt=context.get("add_generation_prompt", False)
        )
        assert got == want, kind
        assert render(ours) == want, kind
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma", "default"])
def test_turns_out_of_order_are_refused_in_words(encoder: Encoder, name: str) -> None:
    with pytest.raises(TemplateError, match=f"the {name} template needs an optional system"):
        encoder.with_template(name).encode([CHAT[1], CHAT[1], CHAT[2]])
