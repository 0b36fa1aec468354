"""Fixtures: where the shared real data is, and small files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the curves of a run only where a test looks at them: they take longer than its few steps."""
    log = sys.modules.get("sftcore.train.log")
    if log is not None and request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(log, "draw_curves", lambda history, folder: [])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, templates and data files, which is not part of the repository."""
    given = os.environ.get("SFTCORE_SHARED")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder ({folder}); set SFTCORE_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the tokenizer and template of SmolLM2."""
    folder = tmp_path_factory.mktemp("model")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = shared_data / "tokenizers" / "smollm2"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 real rows of at most 200 tokens."""
    path = shared_data / "datasets" / "gsm8k" / "train.jsonl"
    short = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) < 450]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(short[:64]), encoding="utf-8")
    return file
