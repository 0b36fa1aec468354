"""`sftcore env`: versions and devices, for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PACKAGES = ("sftcore", "numpy", "torch", "transformers", "peft", "accelerate", "tokenizers", "gguf")


def register(subparsers: Subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser("env", help="show versions and devices, for bug reports")
    parser.set_defaults(run=run)


def run(known: argparse.Namespace) -> None:  # noqa: ARG001
    """Runs the command."""
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"{'devices':<13} {', '.join(devices) or f'cpu, {torch.get_num_threads()} threads'}")
