"""Whether a tuned model stops by itself in plain Transformers, for ways in which a turn may end.

An `Ending` is a tokenizer, a template and what a run is told beside; a new way is one more line of `ENDINGS`. What is
checked reads the saved folder with Transformers and PEFT alone, so that it stops as its generation_config.json says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer

from sftcore.config import TrainConfig
from sftcore.data import Encoder
from tiny_runs import config_of

MOST_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A way in which a turn ends.

    Attributes:
        tokenizer: Its folder in the shared data.
        template: A packaged name, the source of one in Jinja, or a file of the shared templates, the model's own.
        says: What the tuned model answers to each question of a chat, up to where it stops; a row has as many turns.
        stops: The tokens that the saved file must name, beside the model's own `eos`.
        own: Control tokens that the model itself has beyond those of the tokenizer.
        eos: The token that the model itself calls its end; that of the tokenizer where not given.
        settings: More settings of the run.
        seed: Of the random model, one that does not stop by chance.
    """

    tokenizer: str
    template: str
    says: tuple[str, ...]
    stops: tuple[str, ...]
    own: tuple[str, ...] = ()
    eos: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def plain_template(end: str, prompt: str = "assistant:") -> str:
    """A template in Jinja whose messages are `role:content` and an end, itself an expression."""
    return (
        "{% for message in messages %}{{ message.role + ':' + message.content + ("
        + end
        + ") }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + prompt
        + "' }}{% endif %}"
    )


GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GPT_OSS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
ENDINGS = {
    "own token": Ending(
        tokenizer="minimind", template="chatml", says=("so<|im_end|>",), stops=("<|im_end|>",)
    ),
    "a token that is not its eos": Ending(
        tokenizer="minimind",
        template="chatml",
        says=("so<|im_end|>",),
        stops=("<|im_end|>",),
        eos="<|endoftext|>",
    ),
    "two tokens, of which the last is its eos": Ending(
        tokenizer="minimind",
        template=plain_template("'<|im_end|><|endoftext|>'"),
        says=("so<|im_end|><|endoftext|>",),
        stops=("<|endoftext|>",),
        eos="<|endoftext|>",
    ),
    "two tokens that it does not stop at": Ending(
        tokenizer="minimind",
        template=plain_template("'<|over|><|out|>'"),
        says=("so<|over|><|out|>",) * 2,
        stops=("<|out|>",),
        own=("<|over|>", "<|out|>"),
        eos="<|endoftext|>",
    ),
    "the next role's marker, then eos appended": Ending(
        tokenizer="minimind",
        template="glm",
        says=("\n<think></think>\nso<|user|>", "\n<think></think>\nso<|endoftext|>"),
        stops=("<|user|>", "<|endoftext|>"),
        own=GLM,
        eos="<|endoftext|>",
        settings={"append_eos": True},
    ),
    "other inside than last": Ending(
        tokenizer="minimind",
        template="openai-gpt-oss-120b.jinja",
        says=tuple(f"<|channel|>final<|message|>so<|{end}|>" for end in ("end", "return")),
        stops=("<|end|>", "<|return|>"),
        own=GPT_OSS,
        eos="<|endoftext|>",
        settings={"max_length": 512},
    ),
    "eos appended": Ending(
        tokenizer="minimind",
        template=plain_template("''"),
        says=("so<|endoftext|>",),
        stops=("<|endoftext|>",),
        eos="<|endoftext|>",
        settings={"append_eos": True},
    ),
    "new special token": Ending(
        tokenizer="gpt2",
        template="chatml",
        says=("so<|im_end|>",),
        stops=("<|im_end|>",),
        settings={"new_special_tokens": ["template"]},
    ),
    "new special token, then eos": Ending(
        tokenizer="gpt2",
        template="phi",
        says=("so<|end|>",),
        stops=("<|end|>", "<|endoftext|>"),
        settings={"new_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]},
        seed=1,
    ),
}


def make_model(folder: Path, ending: Ending, tokenizers: Path, *, ties: bool = False) -> Path:
    """A random Llama of two layers that has the tokenizer of an ending."""
    tokenizer = tokenizers / ending.tokenizer
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    if ending.eos is not None:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"eos_token": ending.eos}
        path.write_text(json.dumps(settings), encoding="utf-8")
    if ending.own:
        longer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        longer.add_special_tokens([AddedToken(name, normalized=False) for name in ending.own])
        longer.save(str(folder / "tokenizer.json"))
    if ending.template.endswith(".jinja"):
        template = tokenizers.parent / "templates" / ending.template
        (folder / "chat_template.jinja").write_bytes(template.read_bytes())
    encoder = Encoder.from_pretrained(folder)
    torch.manual_seed(ending.seed)
    config = transformers.LlamaConfig(
        vocab_size=encoder.vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=ties,
        # rows that differ enough for a head that stays as it is to tell them apart
        initializer_range=0.3,
        bos_token_id=encoder.eos_token_id,
        eos_token_id=encoder.eos_token_id,
        pad_token_id=encoder.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(path: Path, count: int = 16, *, turns: int = 1) -> Path:
    """Questions that all have the same short answer, in chats of one or more turns."""
    rows = [
        {"query": f"say {number}", "response": "so", "history": [["say it", "so"]] * (turns - 1)}
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def tune_config(
    model: Path, ending: Ending, rows: Path, output: Path, **settings: Any
) -> TrainConfig:
    """The settings of a run that learns the answer, and to stop behind it."""
    template = ending.template
    if template.endswith(".jinja"):
        template = "auto"
    elif "{" in template:
        path = output.parent / f"{output.name}.jinja"
        path.write_text(template, encoding="utf-8")
        template = str(path)
    given: dict[str, Any] = {
        "template": template,
        "max_length": 128,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "max_steps": 50,
        "logging_steps": 20,
        "learning_rate": 2e-2,
        "report_to": ["none"],
    }
    if settings.get("tuner_type") in ("full", "freeze"):
        given["lora_dropout"] = 0.05
    else:
        given |= {"lora_dropout": 0.0, "lora_rank": 16}
    return config_of(model, rows, output, **{**given, **ending.settings, **settings})


def plain_model(folder: Path, base: Path) -> Any:
    """Loads a folder with Transformers and PEFT alone, as a user does; an adapter on a base made long enough."""
    if not (folder / "adapter_config.json").is_file():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    if size > whole.config.vocab_size:
        whole.resize_token_embeddings(size, pad_to_multiple_of=64)
    model = PeftModel.from_pretrained(whole, folder).eval()
    model.generation_config = whole.generation_config = (
        transformers.GenerationConfig.from_pretrained(folder)
    )
    return model


def answer_of(
    folder: Path, base: Path, *, chat: Path | None = None, stops: Path | None = None, turn: int = 0
) -> list[int]:
    """Returns the ids that the model in a folder answers with, up to what its generation_config.json says.

    Args:
        folder: The model, or an adapter.
        base: The model that an adapter was trained on.
        chat: The folder with the chat template; the first one where not given.
        stops: The folder with the generation_config.json; the first one where not given.
        turn: How many questions were answered before.
    """
    answered = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": "so"},
    ] * turn
    text = transformers.AutoTokenizer.from_pretrained(chat or folder).apply_chat_template(
        [*answered, {"role": "user", "content": "say 3"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    ids = reader(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = plain_model(folder, base)
    if stops is not None:
        model.generation_config = transformers.GenerationConfig.from_pretrained(stops)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST_TOKENS, do_sample=False
    )
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


def stops_in(folder: Path) -> list[int]:
    """Returns the `eos_token_id` of a folder's generation_config.json, as a list."""
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]
