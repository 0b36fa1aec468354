"""The machine that a bench ran on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Returns the name of the GPU where there is one, and of the processor elsewhere."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()
