"""Puts the wheels of a pack into a folder, offline, for the parts of the check to import from.

Wheels that are made for another Python or another machine are left out by name; what is installed on the machine
stands in for them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename


def fitting(wheels: list[Path]) -> tuple[list[Path], list[Path]]:
    """Returns the wheels that this Python can install, and the others."""
    tags = set(sys_tags())
    fits = [wheel for wheel in wheels if parse_wheel_filename(wheel.name)[3] & tags]
    return fits, [wheel for wheel in wheels if wheel not in fits]


def install(pack: Path, site: Path) -> dict[str, list[str]]:
    """Installs the wheels of a pack.

    Args:
        pack: What `make gpu-pack` filled; where it has no wheels, the packages of this Python are used.
        site: The folder, to be put on `PYTHONPATH`. What another pack left there is replaced.

    Returns:
        The names of the wheels that are `installed` and `left out`.

    Raises:
        SystemExit: pip fails.
    """
    fits, others = fitting(sorted((pack / "wheels").glob("*.whl")))
    found = {"installed": [wheel.name for wheel in fits], "left out": [w.name for w in others]}
    if not fits:
        return found
    words = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--quiet"]
    words += ["--disable-pip-version-check", "--no-warn-script-location", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *words, *map(str, fits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the wheels of {pack} cannot be installed:\n{done.stderr[-3000:]}")
    return found
