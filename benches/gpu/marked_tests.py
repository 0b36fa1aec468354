"""The tests that are marked `gpu`, each a case of its own, noted as it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu.cases import Cases

ROOT = Path(__file__).parents[2]


class _Note:
    """Tells pytest to note each test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cases: Cases | None = None

    def pytest_collection_finish(self, session: Any) -> None:
        self.cases = Cases(self._path, [item.nodeid for item in session.items])

    def pytest_runtest_logreport(self, report: Any) -> None:
        assert self.cases is not None
        if report.skipped:
            # a path, a line, and why
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.wasxfail
            self.cases.note(report.nodeid, "skipped", reason=str(reason).removeprefix("Skipped: "))
        elif report.failed:
            self.cases.note(report.nodeid, "failed", error=report.longreprtext[-2000:])
        elif report.when == "call":
            self.cases.note(report.nodeid, "passed", case_seconds=round(report.duration, 2))


def marked_tests(pack: Path, work: Path) -> int:
    """Runs the tests marked `gpu` of the files that have some, on the data of the pack."""
    import pytest  # not part of what sftcore needs

    os.environ["SFTCORE_SHARED"] = str(pack / "data")
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    note = _Note(work / "tests.json")
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    words += ["--basetemp", str(work / "tests")]
    code = int(pytest.main([*words, *files], plugins=[note]))
    if note.cases is None or code not in (0, 1):
        print(f"pytest ended with {code} before it had run the tests")
        return 1
    return note.cases.exit_code()
