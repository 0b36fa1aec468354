"""A `.gguf` file to a folder that Transformers can load and train."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from sftcore.errors import ConfigError

# Pre-tokenizers that the conversion of Transformers 5 loses, by the name that registry.toml gives them.
# SmolLM2 splits each digit; without that, numbers get other ids than in its training.
_PRE_TOKENIZERS = {
    "digits-bytelevel": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ],
    }
}


def convert_gguf(file: Path, folder: Path, *, repair: str | None) -> None:
    """Converts `file` into `folder`, which appears whole or not at all.

    Args:
        file: Weights and tokenizer.
        folder: Is replaced where it exists.
        repair: The pre-tokenizer to put in place of the converted one; None keeps that one.

    Raises:
        ConfigError: The `gguf` package is missing.
    """
    try:
        import gguf  # noqa: F401  Transformers reads the file through it
    except ImportError as error:
        raise ConfigError(f"{file.name} needs the package gguf; run pip install gguf") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {file.name} once into {folder}", file=sys.stderr)  # noqa: T201
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        work = Path(temporary) / "model"
        # without dequantize the weights stay packed, and such a model can be neither trained nor saved
        with contextlib.redirect_stderr(io.StringIO()):  # a bar for three seconds
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
            )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(work)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(work)
        _repair_tokenizer(work, repair)
        try:
            os.replace(work, folder)  # noqa: PTH105  replaces an empty folder too
        except OSError:
            # another process was first; its result is the same
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                work.rename(folder)


def _repair_tokenizer(folder: Path, repair: str | None) -> None:
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # other classes build a pre-tokenizer of their own and do not look at tokenizer.json
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    if repair is None:
        return
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = _PRE_TOKENIZERS[repair]
    tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
