"""What the tests of checkpoints share: a small random model, its rows, and the settings of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from sftcore.config import TrainConfig
from sftcore.train.speed import Counts


def make_model(folder: Path, tokenizer: Path) -> Path:
    """A random Llama of two layers with the small tokenizer of `tokenizer`."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=6400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def make_rows(path: Path, count: int) -> Path:
    lines = [
        json.dumps({"query": f"what is {number}?", "response": "it is " + "so " * (number % 7 + 1)})
        for number in range(count)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config_of(model: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "model": str(model),
        "dataset": [str(rows)],
        "output_dir": str(output),
        "add_version": False,
        "tuner_type": "lora",
        "lora_dropout": 0.2,
        "split_dataset_ratio": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "template": "chatml",
    }
    return TrainConfig(**{**given, **settings})


# what a clock tells, and memory
CLOCKED = {*Counts().rates(), "memory_gib", "eta_seconds"}


def contents(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint that decides how a run goes on, comparable bit for bit."""
    found: dict[str, Any] = {}
    for path in checkpoint.iterdir():
        if path.suffix in (".pt", ".pth"):
            # the file of Python's and numpy's random states is read the way the Trainer reads it
            with transformers.trainer_pt_utils.safe_globals():
                found[path.name] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors" or path.name in ("ledger.jsonl", "loader_state.json"):
            found[path.name] = path.read_bytes()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found["log"] = [
        {name: value for name, value in entry.items() if name not in CLOCKED}
        for entry in state["log_history"]
    ]
    found["epoch"] = state["epoch"]
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    found["unlogged"] = {name: value for name, value in manifest.items() if "logged" in name}
    return found


def plain(value: Any) -> Any:
    """Tensors and arrays as bytes, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def names_in(folder: Path, pattern: str = "*checkpoint*") -> list[str]:
    """Returns the names in a run folder that fit a pattern."""
    # the lock stays in the folder, held by nobody
    return sorted(path.name for path in folder.glob(pattern) if path.name != ".lock")
