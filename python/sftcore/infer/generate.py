"""A model with its encoder, and what it answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftModel
from transformers.generation.streamers import BaseStreamer

from sftcore.config import InferConfig
from sftcore.config.quantization import QuantizationConfig
from sftcore.data import Encoder
from sftcore.data.model_names import checkpoint_of, near_folders
from sftcore.data.prompts import Message
from sftcore.errors import ConfigError, SftcoreError
from sftcore.models import load_model, load_settings, pick_dtype, quieten, resolve_model
from sftcore.models.generation import generation_config, within_positions
from sftcore.models.new_tokens import extend_embedding, read_new_tokens
from sftcore.models.quantization import quantization_config
from sftcore.train.output import read_args


def adapter_folder(name: str) -> Path:
    """Returns the checkpoint that `--adapters` names: the folder itself, or of a run folder its best, else its last.

    Raises:
        ConfigError: There is no such folder.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--adapters {name}: there is no such folder{near_folders(name)}")
    return checkpoint_of(path)


def base_of(adapters: Path, given: str | None) -> Path:
    """Returns the folder of the model that an adapter was trained on.

    Raises:
        ConfigError: The checkpoint is none, or its base model is not here.
    """
    path = adapters / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(
            f"--adapters {adapters} has no adapter_config.json; expected a checkpoint-N folder of a run with an "
            "adapter; one of whole weights is a model by itself, for --model"
        )
    named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if given is None and named and Path(named).is_dir():
        return Path(named)
    name = given or read_args(adapters).get("model") or named
    if not name:
        raise ConfigError(f"{path} names no base model; pass --model")
    return resolve_model(str(name))


def quantization_of(config: InferConfig, adapters: Path | None) -> QuantizationConfig:
    """Returns how weights are quantized: as the settings say, else as they were when the adapter was trained."""
    names = [field.name for field in fields(QuantizationConfig)]
    is_given = any(getattr(config, name) != getattr(QuantizationConfig, name) for name in names)
    then = read_args(adapters) if adapters else {}
    trained = QuantizationConfig(**{name: then[name] for name in names if name in then})
    if is_given or trained.weight_bits is None:
        return config
    _say(
        f"note: weights are loaded in {trained.weight_bits} bits, as when {adapters} was trained; --quant_bits 0 loads "
        "them whole"
    )
    return trained


class Chat:
    """A loaded model that answers conversations."""

    def __init__(self, config: InferConfig) -> None:
        quieten()
        adapters = adapter_folder(config.adapters) if config.adapters else None
        given = config.model
        if adapters is None and given and Path(given).expanduser().is_dir():
            named = checkpoint_of(Path(given).expanduser())
            # the checkpoint of an adapter, or a run that made one, named as the model
            if not (named / "config.json").is_file() and (named / "adapter_config.json").is_file():
                adapters, given = named, None
        folder = base_of(adapters, given) if adapters else resolve_model(str(given))
        # a checkpoint carries the tokenizer and the template that its training used
        home = adapters if adapters and (adapters / "tokenizer.json").is_file() else folder
        # what training rendered, inference renders
        then = read_args(home)
        system = then.get("system") if config.system is None else config.system
        self.encoder = Encoder.from_pretrained(
            home,
            template=config.template,
            system=system or None,
            chat_template_kwargs=json.loads(then.get("chat_template_kwargs") or "{}"),
        )
        if system and config.system is None:
            _say(
                f"note: the system message is that of the training: {system!r}; --system '' leaves it out"
            )
        self.encoder.chat_template  # noqa: B018  raises where there is none
        quantized = quantization_config(
            quantization_of(config, adapters), pick_dtype(config.torch_dtype)
        )
        # says what is wrong with a model before its weights are read
        load_settings(folder, trust_remote_code=config.trust_remote_code)
        model = load_model(
            folder,
            torch_dtype=config.torch_dtype,
            trust_remote_code=config.trust_remote_code,
            quantization_config=quantized,
        )
        if adapters:
            if new_tokens := read_new_tokens(adapters):
                extend_embedding(model, new_tokens)
            model = PeftModel.from_pretrained(model, adapters)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # quantized weights lie where they run already
        self.model = (model if quantized else model.to(self.device)).eval()
        self.config = config
        self.generation = generation_config(self.encoder, config, folder)

    def answer(
        self, messages: list[Message], *, on_text: Callable[[str], object] | None = None
    ) -> str:
        """Returns the answer to messages whose last is the user's.

        Args:
            messages: With `role` and `content`; those without a system message get the configured one.
            on_text: Called with each piece of the answer as it comes.

        Raises:
            SftcoreError: They are longer than the model can read.
        """
        prompt = torch.from_numpy(self.encoder.encode_prompt(messages))[None].to(self.device)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and prompt.shape[1] > limit:
            raise SftcoreError(
                f"the prompt has {prompt.shape[1]:,} tokens, and the model {limit:,} positions; shorten it"
            )
        torch.manual_seed(self.config.seed)
        streamer = _TextStreamer(self.encoder, on_text) if on_text else None
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=within_positions(self.model, self.generation, prompt.shape[1]),
                streamer=streamer,
            )
        return self.encoder.decode(output[0, prompt.shape[1] :].tolist()).strip()


class _TextStreamer(BaseStreamer):  # type: ignore[misc, unused-ignore]
    """Hands on the text of tokens as soon as it is whole characters."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], object]) -> None:
        self.encoder = encoder
        self.on_text = on_text
        self.ids: list[int] | None = None
        self.shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then one token after another."""
        if self.ids is None:
            self.ids = []
            return
        self.ids.extend(value.flatten().tolist())
        text = self.encoder.decode(self.ids)
        # a character whose bytes are not all there yet decodes to the replacement character
        if not text.endswith("\ufffd"):
            self.on_text(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        """Hands on what is left."""
        text = self.encoder.decode(self.ids or [])
        self.on_text(text[self.shown :])


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
