"""Two nodes are one run: as good as one node with as many processes, and a lost node costs no more than a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from launched_runs import STEPS, Run, check_same_end, words_of
from tiny_runs import contents, make_model, make_rows
from two_nodes import SILENCE, why_not

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def found(folder: Path, shared_data: Path) -> dict[str, Any]:
    if reason := why_not():
        pytest.skip(reason)
    model = make_model(folder / "model", shared_data / "tokenizers" / "minimind")
    rows = make_rows(folder / "rows.jsonl", 24)
    script = Path(__file__).parent.parent / "two_nodes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(rows), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    nodes: dict[str, Any] = json.loads(done.stdout)
    words = words_of(model, rows, folder / "one")
    with Run(words, folder / "one-node", NPROC_PER_NODE="2") as run:
        assert run.end() == 0, run.said
    return nodes


def final(folder: Path) -> dict[str, Any]:
    return contents(folder / f"checkpoint-{STEPS}")


def test_two_nodes_train_as_one_with_as_many_processes(found: dict[str, Any], folder: Path) -> None:
    whole = found["undisturbed"]
    assert whole["codes"] == [0, 0], whole["said"]
    assert whole["out"] == f"{folder / 'whole' / f'checkpoint-{STEPS}'}\n"
    assert final(folder / "whole") == final(folder / "one")
    # node 1 has nothing to say but that it waits
    assert whole["said"][1].splitlines() == ["waiting for node 0 at 10.77.23.1:29500"]


def test_a_node_that_is_cut_off_ends_the_run_in_bounded_time(found: dict[str, Any]) -> None:
    cut = found["cut"]
    assert cut["codes"] == [1, 1], cut["said"]
    assert cut["took"] < SILENCE + 60
    assert cut["left"] == []
    assert cut["said"][0].count(f"error: node 1 was not heard of for {SILENCE} seconds") == 1
    assert cut["said"][1].count("error: node 0") == 1
    assert "Traceback" not in "".join(cut["said"])
    assert cut["fault"] is None
    assert 4 <= cut["newest"] < STEPS


def test_a_node_that_comes_back_takes_part_in_a_run_that_starts_anew(
    found: dict[str, Any], folder: Path
) -> None:
    back = found["back"]
    assert back["lost"] == 1
    assert back["codes"] == [0, 0], back["said"]
    assert "started anew: going on from the last checkpoint of this run" in back["said"][0]
    check_same_end(folder / "run", folder / "whole")
