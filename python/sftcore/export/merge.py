"""`merge`: an adapter into its base weights, as a folder that plain Transformers loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sftcore.config import MergeConfig
from sftcore.data import Encoder
from sftcore.data.run import save_tokenizer
from sftcore.errors import ConfigError
from sftcore.infer.generate import base_of
from sftcore.models import quieten


def merge(config: MergeConfig) -> Path:
    """Merges as `config` says and returns the folder, which appears whole or not at all.

    Raises:
        ConfigError: The checkpoint is none, or the output folder is not empty.
    """
    quieten()
    adapters = Path(config.adapters)
    base = base_of(adapters, config.model)
    output = Path(config.output_dir or f"{adapters}-merged")
    if output.exists() and any(output.iterdir()) and not config.overwrite:
        raise ConfigError(
            f"--output_dir {output} is not empty; pass --overwrite true or another folder"
        )
    dtype = "auto" if config.torch_dtype == "auto" else getattr(torch, config.torch_dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    encoder = Encoder.from_pretrained(adapters if (adapters / "tokenizer.json").is_file() else base)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        work = Path(temporary) / "model"
        merged.save_pretrained(work)
        save_tokenizer(encoder, work)
        if output.exists():
            shutil.rmtree(output)
        work.rename(output)
    return output
