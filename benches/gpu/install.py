"""Puts the wheels of a pack into a folder, offline, for the parts of the check to import from.

Left out by name are wheels that are made for another Python or machine, and those that need a package which neither the
pack nor the machine has: Transformers imports `datasets` wherever it is installed, and would fail where it cannot run.
"""

from __future__ import annotations

import email
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename


def is_installed(name: str) -> bool:
    """Returns whether this Python has a package."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needs_of(wheel: Path) -> list[Requirement]:
    """Returns what a wheel needs here or elsewhere, without what its extras do."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(path))
    needs = map(Requirement, fields.get_all("Requires-Dist", []))
    return [need for need in needs if "extra ==" not in str(need.marker)]


def choose(
    wheels: list[Path], present: Callable[[str], bool] = is_installed
) -> tuple[list[Path], dict[str, str]]:
    """Returns the wheels that this Python can use, and why it cannot use others, by name.

    Args:
        wheels: Of a pack.
        present: Whether the machine has a package.
    """
    tags = set(sys_tags())
    fits = {
        parse_wheel_filename(wheel.name)[0]: wheel
        for wheel in wheels
        if parse_wheel_filename(wheel.name)[3] & tags
    }
    left_out = {
        wheel.name: "made for another Python or machine"
        for wheel in wheels
        if wheel not in fits.values()
    }
    needs = {
        name: [
            need
            for need in needs_of(wheel)
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
        for name, wheel in fits.items()
    }
    while True:
        lacking = {
            name: need.name
            for name, wanted in needs.items()
            for need in reversed(wanted)
            if name in fits and canonicalize_name(need.name) not in fits and not present(need.name)
        }
        if not lacking:
            return list(fits.values()), left_out
        for name, need in lacking.items():
            left_out[fits.pop(name).name] = f"needs {need}, which is not on this machine"


def install(pack: Path, site: Path) -> dict[str, Any]:
    """Installs the wheels of a pack.

    Args:
        pack: What `make gpu-pack` filled.
        site: The folder, to be put on `PYTHONPATH`; what is there is removed.

    Returns:
        The names of the wheels that are `installed`, and those `left out` with the reason.

    Raises:
        SystemExit: pip fails.
    """
    chosen, left_out = choose(sorted((pack / "wheels").glob("*.whl")))
    # what was installed when more was there would be in the way
    shutil.rmtree(site, ignore_errors=True)
    words = ["--no-index", "--no-deps", "--no-compile", "--quiet"]
    words += ["--disable-pip-version-check", "--no-warn-script-location", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *words, *map(str, chosen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the wheels of {pack} cannot be installed:\n{done.stderr[-3000:]}")
    return {"installed": [wheel.name for wheel in chosen], "left out": left_out}
