"""Names of data sets to files.

`self-cognition` is filled with the names the user gives and written, under a name that says its
content, into the cache folder, so that a resumed run finds the very same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from sftcore.config import TrainConfig
from sftcore.config.schema import did_you_mean
from sftcore.errors import ConfigError
from sftcore.models.registry import cache_folder

_FOLDER = Path(__file__).parent.parent / "datasets"
BUNDLED = {
    "self-cognition": _FOLDER / "self_cognition.jsonl",
    "everyday": _FOLDER / "everyday.jsonl",
}


def resolve_datasets(names: list[str], config: TrainConfig) -> list[str]:
    """Returns the path of each data set, keeping a `#N` suffix.

    Raises:
        ConfigError: A name is unknown, or self-cognition lacks a name to teach.
    """
    bases = [name.partition("#")[0] for name in names]
    wants_names = "self-cognition" in bases
    for setting in ("model_name", "model_author"):
        if getattr(config, setting) and "self-cognition" not in (*bases, *config.dataset):
            raise ConfigError(f"--{setting} has no effect without --dataset self-cognition")
        if wants_names and not getattr(config, setting):
            raise ConfigError(
                f"--dataset self-cognition needs --{setting}, for example --model_name 小松 Sofie "
                f'--model_author 松果实验室 "Pinecone Lab"'
            )
    paths = []
    for name in names:
        base, mark, number = name.partition("#")
        if base in BUNDLED:
            path = BUNDLED[base]
            if base == "self-cognition":
                path = _fill_names(path, config.model_name, config.model_author)
            paths.append(f"{path}{mark}{number}")
        elif "/" not in base and "." not in base and not Path(base).exists():
            raise ConfigError(
                f'dataset "{base}" is unknown: no such file, and not one of {", ".join(BUNDLED)}'
                f"{did_you_mean(base, BUNDLED)}"
            )
        else:
            paths.append(name)
    return paths


def _fill_names(path: Path, names: list[str], authors: list[str]) -> Path:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        # one name stands for both languages, of two the first is the Chinese one
        place = 0 if row["language"] == "zh" else -1
        for key in ("query", "response"):
            text = row[key].replace("{{NAME}}", names[place])
            row[key] = text.replace("{{AUTHOR}}", authors[place])
        rows.append(json.dumps(row, ensure_ascii=False))
    content = ("\n".join(rows) + "\n").encode()
    folder = cache_folder() / "datasets"
    filled = folder / f"self_cognition-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
    if not filled.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(filled)
    return filled
