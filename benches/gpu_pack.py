"""Fills a folder with all that travels to a GPU machine without a network, and holds it to its size.

    python benches/gpu_pack.py --wheel dist/sftcore-…-abi3-….whl [--out .gpu] [--shared ../shared/data]

The machine has Python 3.12, torch, its kin and the packages in `ON_THE_MACHINE`; what sftcore and TRL need beyond those
comes as wheels in the versions of constraints.txt. On the other side, `python .gpu/benches/gpu_check.py --pack .gpu`
installs them offline and runs the check. Needs pip and a registry, packaging, and setuptools for deepspeed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

from gpu.install import needs_of
from gpu.made_data import write_rows, write_tokenizer

ROOT = Path(__file__).parent.parent
MOST_BYTES = 56 * 2**20
PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WHEELS = (
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "peft",
    "accelerate",
    "gguf",
    # of transformers
    "regex",
    # of huggingface_hub, which needs new ones
    "anyio",
    "click",
    "h11",
    "hf-xet<2",
    "httpcore2",
    "httpx2",
    "idna",
    "truststore",
    "typing-extensions",
    # TRL, with what reads its rows
    "trl",
    "datasets",
    "dill>=0.4.1,<0.4.2",
    "multiprocess<0.70.20",
    # of deepspeed
    "hjson",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
)
# ships sources alone
_BUILT = "deepspeed"
# what a machine with torch, JAX and the usual packages of science has; pyarrow is too large to bring along
ON_THE_MACHINE = frozenset(
    canonicalize_name(name)
    for name in [
        "einops",
        "filelock",
        "fsspec",
        "jinja2",
        "matplotlib",
        "msgpack",
        "ninja",
        "numpy",
        "packaging",
        "pandas",
        "psutil",
        "py-cpuinfo",
        "pyarrow",
        "pytest",
        "pytest-timeout",
        "pyyaml",
        "requests",
        "rich",
        "safetensors",
        "tensorboard",
        "torch",
        "tqdm",
        "triton",
        "typer",
        "xxhash",
    ]
)
# what the check runs, beside the package
_FILES = ("benches/gpu_check.py", "benches/train.py", "benches/gpu", "tests", "pyproject.toml")
# of the shared data; a tokenizer that has no template is that of the small models of the tests
_TOKENIZERS = ("smollm2", "minimind")
_ROWS = Path("datasets") / "gsm8k" / "train.jsonl"
_MARK = "pack.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".gpu"))
    parser.add_argument("--wheel", type=Path, required=True, help="the release wheel of sftcore")
    shared = Path(os.environ.get("SFTCORE_SHARED", "../shared/data"))
    parser.add_argument("--shared", type=Path, default=shared)
    options = parser.parse_args()
    own = options.wheel
    if not own.is_file() or not own.name.startswith("sftcore-"):
        parser.error(f"--wheel {own} is no wheel of sftcore; make wheel builds one")
    if "abi3" not in own.name:
        parser.error(f"--wheel {own} is for one Python alone; make wheel builds one for all")
    clear(options.out)
    wheels = options.out / "wheels"
    wheels.mkdir()
    shutil.copy2(own, wheels)
    download(wheels)
    build(wheels)
    lacking = missing(sorted(wheels.glob("*.whl")), ON_THE_MACHINE)
    if lacking:
        print("the pack is not whole:", *lacking, sep="\n  ", file=sys.stderr)
        return 1
    add_files(options.out)
    origin = add_data(options.out, options.shared)
    about = {"python": PYTHON, "data": origin, "expected": sorted(ON_THE_MACHINE)}
    (options.out / _MARK).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return show(options.out)


def clear(out: Path) -> None:
    """Makes an empty folder, in place of a pack that is there.

    Raises:
        SystemExit: The folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise SystemExit(f"{out} holds something that is no pack; remove it, or pass --out FOLDER")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    # a pack that was not finished may be replaced too
    (out / _MARK).write_text("{}", encoding="utf-8")


def download(wheels: Path, names: Sequence[str] = WHEELS) -> None:
    """Downloads wheels for the Python and the machine that the pack is for, in tested versions."""
    words = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
    words += ["--implementation", "cp", *(f"--platform={name}" for name in _PLATFORMS)]
    words += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(wheels)]
    _pip("download", *words, *names)


def build(wheels: Path, name: str = _BUILT) -> None:
    """Builds a wheel of what ships sources alone, without kernels, which are built where they run."""
    words = ["--no-deps", "--no-build-isolation", "--constraint", str(ROOT / "constraints.txt")]
    _pip("wheel", *words, "--wheel-dir", str(wheels), name)
    made = next(wheels.glob(f"{name}-*.whl"))
    if not made.name.endswith("-py3-none-any.whl"):
        raise SystemExit(f"{made.name} is for this machine alone; expected one for any")


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
    # deepspeed would build its kernels where it finds a compiler for them
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    if subprocess.run(command, check=False, env=environment).returncode:
        raise SystemExit(f"pip {words[0]} failed: {' '.join(words)}")


def missing(wheels: Iterable[Path], present: Iterable[str]) -> list[str]:
    """Returns what wheels need that is neither among them, in a version that fits, nor on the machine.

    Args:
        wheels: Of the pack.
        present: The packages of the machine, whose versions are not known.
    """
    packed = {}
    for wheel in wheels:
        name, version, _, _ = parse_wheel_filename(wheel.name)
        packed[name] = version, needs_of(wheel)
    there = {canonicalize_name(name) for name in present}
    machine = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    lacking = []
    for name, (_, needs) in packed.items():
        for need in needs:
            if need.marker is not None and not need.marker.evaluate(machine):
                continue
            wanted = canonicalize_name(need.name)
            if wanted in packed:
                if not need.specifier.contains(packed[wanted][0], prereleases=True):
                    lacking.append(f"{name} needs {need}, and the pack has {packed[wanted][0]}")
            elif wanted not in there:
                lacking.append(f"{name} needs {need}, which is neither here nor on the machine")
    return lacking


def add_files(out: Path, root: Path = ROOT, names: Sequence[str] = _FILES) -> None:
    """Copies the check and the tests, so that the pack needs no checkout beside it."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in names:
        source, target = root / name, out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy2(source, target)


def add_data(out: Path, shared: Path) -> str:
    """Copies tokenizers and rows, or makes them where they are absent; returns where they are from."""
    data = out / "data"
    (data / "tokenizers").mkdir(parents=True)
    if not (shared / _ROWS).is_file():
        for name in _TOKENIZERS:
            write_tokenizer(data / "tokenizers" / name)
        write_rows(data / _ROWS)
        return f"made on the spot, as {shared} is absent"
    for name in _TOKENIZERS:
        folder = data / "tokenizers" / name
        folder.mkdir()
        for path in sorted((shared / "tokenizers" / name).glob("tokenizer*.json")):
            # bytes alone: the shared files may not be written to
            shutil.copyfile(path, folder / path.name)
    (data / _ROWS).parent.mkdir(parents=True)
    shutil.copyfile(shared / _ROWS, data / _ROWS)
    return "the shared data"


def show(out: Path, most_bytes: int = MOST_BYTES) -> int:
    """Prints what a pack holds, largest first, with sizes; returns 1 where it is over `most_bytes`."""
    sizes: dict[str, int] = {}
    for path in out.rglob("*"):
        if path.is_file():
            parts = path.relative_to(out).parts
            # wheels one by one, all else by its folder
            name = "/".join(parts[: 2 if parts[0] in ("wheels", "data") else 1])
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB  in all, of {most_bytes / 2**20:g} at most")
    if total > most_bytes:
        print(f"{out} is over {most_bytes / 2**20:g} MiB and would not travel", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
