"""`merge`: an adapter into its base weights, as a folder that plain Transformers loads."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from sftcore.config import MergeConfig
from sftcore.data import Encoder
from sftcore.data.run import save_tokenizer
from sftcore.errors import ConfigError
from sftcore.infer.generate import adapter_folder, base_of
from sftcore.models import load_settings, quieten
from sftcore.models.generation import plain_generation
from sftcore.models.new_tokens import extend_embedding, read_new_tokens
from sftcore.models.stops import GENERATION_FILE, write_generation_config


def merge(config: MergeConfig) -> Path:
    """Merges as `config` says and returns the folder, which appears whole or not at all.

    Raises:
        ConfigError: The checkpoint is none, or the output folder is not empty or holds what is merged.
    """
    quieten()
    adapters = adapter_folder(config.adapters)
    base = base_of(adapters, config.model)
    output = Path(config.output_dir or f"{adapters}-merged")
    for name, kept in (("--adapters", adapters), ("its base model", base)):
        if kept.resolve().is_relative_to(output.resolve()):
            raise ConfigError(
                f"--output_dir {output} holds {name} ({kept}), which it would replace; expected another folder"
            )
    if output.exists() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"--output_dir {output} is not empty; pass --overwrite true or another folder"
        )
    load_settings(base, trust_remote_code=config.trust_remote_code)
    dtype = "auto" if config.torch_dtype == "auto" else getattr(torch, config.torch_dtype)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, trust_remote_code=config.trust_remote_code
    )
    if new_tokens := read_new_tokens(adapters):
        extend_embedding(model, new_tokens)
    merged = merged_model(PeftModel.from_pretrained(model, adapters))
    encoder = Encoder.from_pretrained(adapters if (adapters / "tokenizer.json").is_file() else base)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        work = Path(temporary) / "model"
        with plain_generation(merged):
            merged.save_pretrained(work)
        save_tokenizer(encoder, work)
        home = adapters if (adapters / GENERATION_FILE).is_file() else base
        write_generation_config(work, home=home, trained=encoder.stop_token_ids)
        if output.exists():
            shutil.rmtree(output)
        work.rename(output)
    return output


def merged_model(tuned: Any) -> Any:
    """Returns the model inside a PEFT model with the adapter in its weights.

    Where the embedding shares its weight with the head and an adapter is on them, PEFT would add the update of each to
    the one weight. Here each gets its own; they share it again where they are equal, and are saved apart where not.
    """
    inner = tuned.get_base_model()
    head, embedding = (
        _original(module)
        for module in (inner.get_output_embeddings(), inner.get_input_embeddings())
    )
    is_tied = head is not None and head.weight is embedding.weight
    if is_tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        # of weights that are told to be apart here, and tied again below where they are equal
        warnings.filterwarnings("ignore", message=".*no longer tied after merging.*")
        merged = tuned.merge_and_unload()
    if is_tied:
        weights = [
            module.weight
            for module in (merged.get_output_embeddings(), merged.get_input_embeddings())
        ]
        are_equal = torch.equal(*weights)
        # PEFT takes the two for apart by now, and says so in the configuration
        merged.config.get_text_config().tie_word_embeddings = are_equal
        merged.config.tie_word_embeddings = are_equal
        if are_equal:
            merged.tie_weights()
    return merged


def _original(module: Any) -> Any:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
