"""A tokenizer and rows made on the spot, for a pack where the shared data is absent.

Words are of two syllables. The tokenizer is a byte-level BPE whose merges make each word, with the space before it, one
token, so that lengths are like those of real text.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

_SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _words() -> list[str]:
    draw = random.Random(0)
    return sorted({draw.choice(_SYLLABLES) + draw.choice(_SYLLABLES) for _ in range(900)})


def _alphabet() -> list[str]:
    """Returns the letters that byte-level BPE writes for the 256 bytes; printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of about 2,200 tokens, with ChatML as its template."""
    folder.mkdir(parents=True)
    words = _words()
    merges = [f"{one[0]} {one[1]}" for one in _SYLLABLES]
    merges += [f"{word[:2]} {word[2:]}" for word in words]
    merges += [f"Ġ {word}" for word in words]
    tokens = [*_SPECIAL, *_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, content in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": _TEMPLATE,
        "model_max_length": 16384,
    }
    for name, value in {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_rows(path: Path, count: int = 6000) -> None:
    """Writes questions and answers of made-up words: 2 MB, as many as `count`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(1), _words()

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(8, most)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"question": text(50), "answer": text(90)}) + "\n")
