"""A run may be killed at any moment: the last checkpoint is whole, and what comes out is what would have come out."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_runs import contents, make_model, make_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
]


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


def run_python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def scenario(name: str, model: Path, folder: Path, num_rows: int) -> tuple[Any, str]:
    """What a scenario of `killed_runs.py` found, and what it said."""
    rows = make_rows(folder / "rows.jsonl", num_rows)
    script = Path(__file__).with_name("killed_runs.py")
    done = run_python([str(script), name, str(model), str(rows), str(folder)])
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_run_killed_ten_times_equals_the_uninterrupted_one(model: Path, tmp_path: Path) -> None:
    rounds, said = scenario("kill_again_and_again", model, tmp_path, 40)
    assert len(rounds) == 10
    for number, found in enumerate(rounds):
        assert found["killed"], (number, said)
        # every checkpoint that has its name is whole, and the next start goes on from the newest
        assert found["faults"] == []
        assert found["newest"] >= found["seen"] > found["begun"]
    for found, following in itertools.pairwise(rounds):
        assert f"checkpoint-{found['newest']}, after step {found['newest']} of 40" in said
        assert following["begun"] == found["newest"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert contents(run / "checkpoint-40") == contents(whole / "checkpoint-40")
    assert (run / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
    lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == [
        "checkpoint-39",
        "checkpoint-40",
    ]
    # a lock that a killed run held keeps nobody out, and nothing says that it is held
    assert [path.name for path in run.glob(".*")] == [".lock"]


def test_signals_to_the_command_give_exit_codes_and_whole_checkpoints(
    model: Path, tmp_path: Path
) -> None:
    found, said = scenario("strike_the_command", model, tmp_path, 40)
    second = found.pop("second run")
    assert second["status"] == 2
    assert f"{tmp_path / 'SIGTERM'} is in use by another run (process {second['first']} on" in said
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):
        assert found[name]["status"] == code, said
        last = found[name]["steps"][-1]
        assert f"stopped by {name} after step {last} of" in said
        assert found[name]["faults"] == []
        assert not found[name]["has_result"]
    # the second signal ends the process in the middle of a save, as the system does; a shell shows 143 too
    assert found["twice"] == {
        "status": -signal.SIGTERM,
        "steps": [3],
        "faults": [],
        "has_result": False,
    }


@pytest.mark.distributed
def test_ranks_stop_at_the_same_step_and_go_on_as_if_they_had_not(
    model: Path, tmp_path: Path
) -> None:
    rows = make_rows(tmp_path / "rows.jsonl", 12)
    script = Path(__file__).with_name("stopped_ranks.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = run_python([*launch, str(model), str(rows), str(tmp_path)])
    for rank in range(2):
        assert f"rank {rank}: 143, stopped by SIGTERM after step 3 of 6" in done.stdout
    run, whole = tmp_path / "run" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6"
    assert contents(run) == contents(whole)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= contents(run).keys()
