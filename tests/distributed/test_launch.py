"""Launching, and what goes wrong: a fault ends the run in bounded time, is said once, and leaves what goes on."""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from launched_runs import SFTCORE, STEPS, Run, check_same_end, newest, words_of
from sftcore.cli import main
from sftcore.cli.launch import read_place
from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train.checkpoints import find_fault, list_checkpoints
from sftcore.train.distributed import World, read_world
from sftcore.train.output import is_of_start_before, write_environment
from tiny_runs import contents, make_model, make_rows

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc"),
]

TWO = {"NPROC_PER_NODE": "2"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FAULTS = Path(__file__).parent.parent / "faults"


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


@pytest.fixture(scope="module")
def whole(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with Run(words_of(model, rows, folder / "run"), folder / "log", **TWO) as run:
        assert run.end() == 0, run.said
    return run


def final(folder: Path) -> dict[str, Any]:
    return contents(folder / f"checkpoint-{STEPS}")


def test_one_command_trains_in_two_processes_and_says_everything_once(whole: Run) -> None:
    run = whole.out.parent / "run"
    assert whole.out.read_text() == f"{run / f'checkpoint-{STEPS}'}\n"
    manifest = json.loads((run / f"checkpoint-{STEPS}" / "checkpoint.json").read_text())
    assert manifest["world_size"] == 2
    counts = collections.Counter(line for line in whole.said.splitlines() if line.strip())
    assert [line for line, count in counts.items() if count > 1] == []
    assert "2 processes: ddp" in whole.said
    assert "warning" not in whole.said.lower()


def test_torchrun_starts_the_same_run(whole: Run, model: Path, rows: Path, tmp_path: Path) -> None:
    words = ["-m", "sftcore.cli", *words_of(model, rows, tmp_path / "run")]
    with Run(words, tmp_path / "log", command=TORCHRUN) as run:
        assert run.end() == 0, run.said
    assert run.out.read_text() == f"{tmp_path / 'run' / f'checkpoint-{STEPS}'}\n"
    assert final(tmp_path / "run") == final(whole.out.parent / "run")


def test_deepspeed_starts_the_same_run(whole: Run, model: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs the launcher of DeepSpeed")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]
    words = ["sftcore.cli", *words_of(model, rows, tmp_path / "run")]
    with Run(words, tmp_path / "log", command=command) as run:
        assert run.end() == 0, run.said
    assert final(tmp_path / "run") == final(whole.out.parent / "run")


def test_accelerate_which_starts_one_process_in_place_of_two_is_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words = ["--module", "sftcore.cli", *words_of(model, rows, tmp_path / "run")]
    with Run(words, tmp_path / "log", command=command) as run:
        assert run.end() != 0
    assert run.said.count("error: this process does not know the others (accelerate launch") == 1
    assert not (tmp_path / "run").exists()


def test_the_rank_that_a_launcher_adds_to_the_words_is_no_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--local-rank=1", "train", "--no_such_flag", "1"]) == 2
    assert "unknown flag --no_such_flag" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_process_that_others_stand_beside_unknown_is_no_run_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(model="any", dataset=["any.jsonl"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    assert read_world(config).size == 1
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"{name}=2"):
        read_world(config)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert read_world(config).size == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: expected a whole number"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: expected 1 or more"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "NNODES=2 needs MASTER_ADDR too"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 is out of range"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is out of range"),
    ],
)
def test_wrong_variables_are_said(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_place()


def test_a_wrong_flag_is_said_once_before_any_process_starts(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    begun = time.monotonic()
    words = words_of(model, rows, tmp_path / "run", learning_rate="fast")
    with Run(words, tmp_path / "log", **TWO) as run:
        assert run.end() == 2
    # torch alone takes longer
    assert time.monotonic() - begun < 60
    assert [line for line in run.said.splitlines() if line.startswith("error:")] == [
        run.said.splitlines()[0]
    ]
    assert "learning_rate" in run.said
    assert not (tmp_path / "run").exists()


def test_a_wrong_row_is_shown_once_with_its_place(model: Path, rows: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(rows.read_text() + '\n{"query": "what?", "response": 3}\n')
    with Run(words_of(model, wrong, tmp_path / "run"), tmp_path / "log", **TWO) as run:
        assert run.end() == 1
    assert run.said.count(f"{wrong}:25") == 1
    assert run.said.count("error:") == 1
    assert "Traceback" not in run.said


@pytest.mark.parametrize("kind", ["error", "bug"])
def test_the_error_of_one_rank_is_the_one_that_is_shown(
    model: Path, rows: Path, tmp_path: Path, kind: str
) -> None:
    path = os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")])
    faults = {"FAULT": f"1:{kind}", "PYTHONPATH": path}
    words = words_of(model, rows, tmp_path / "run", max_restarts=int(kind == "error"))
    with Run(words, tmp_path / "log", **TWO, **faults) as run:
        assert run.end() == 1
        assert run.ranks() == {}
    assert "another process" not in run.said
    if kind == "error":
        assert run.said.count("error: rank 1: the fan of this device stands still") == 1
        assert "Traceback" not in run.said
        # it would come again
        assert "anew" not in run.said
    else:
        assert run.said.count("Traceback (most recent call last)") == 1
        assert run.said.rstrip().endswith("ZeroDivisionError: a bug on one rank")
        assert "rank 1:" in run.said


def test_a_run_that_is_struck_again_and_again_equals_the_undisturbed_one(
    whole: Run, model: Path, rows: Path, tmp_path: Path
) -> None:
    """Each start goes on where the one before was struck; the last starts itself anew."""
    folder = tmp_path / "run"
    words = words_of(model, rows, folder, resume_from_checkpoint="auto")

    def strike(
        name: str, step: int, *strikes: tuple[int | str, signal.Signals], more: tuple[str, ...] = ()
    ) -> tuple[int, str, float]:
        with Run([*words, *more], tmp_path / name, **TWO) as run:
            run.wait_until(lambda: newest(folder) >= step)
            ranks = run.ranks()
            assert sorted(ranks) == [0, 1]
            begun = time.monotonic()
            for target, number in strikes:
                os.kill(run.process.pid if isinstance(target, str) else ranks[target], number)
            code = run.end()
            took = time.monotonic() - begun
            assert run.ranks() == {}
        steps = list_checkpoints(folder)
        assert find_fault(steps[max(steps)]) is None
        assert run.said.count(f"stopped by {strikes[0][1].name} after step") == int(
            code in (130, 143)
        )
        return code, run.said, took

    assert strike("one rank", 2, (1, signal.SIGTERM))[0] == 143
    assert strike("ctrl-c", 5, ("launcher", signal.SIGINT))[0] == 130
    # as schedulers do that tell each process of a job
    all_of_them = [(target, signal.SIGTERM) for target in (0, "launcher", 1)]
    assert strike("everyone", 8, *all_of_them)[0] == 143

    code, said, took = strike("killed", 11, (1, signal.SIGKILL))
    assert code == 137
    assert took < 30
    assert said.count("error: rank 1 was killed by SIGKILL") == 1
    assert "another process" not in said
    assert newest(folder) < STEPS

    code, said, _ = strike("anew", 15, (0, signal.SIGKILL), more=("--max_restarts", "1"))
    assert code == 0, said
    assert said.count("error: rank 0 was killed by SIGKILL") == 1
    assert "starting all processes anew (1 of 1)" in said
    assert "started anew: going on from the last checkpoint of this run" in said

    check_same_end(folder, whole.out.parent / "run")
    ledgers = [run / "ledger.jsonl" for run in (folder, whole.out.parent / "run")]
    assert ledgers[0].read_bytes() == ledgers[1].read_bytes()


def test_a_second_signal_ends_the_run_at_once(model: Path, rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run(words_of(model, rows, folder, max_steps=10_000), tmp_path / "log", **TWO) as run:
        run.wait_until(lambda: newest(folder) >= 1)
        # a rank that stands still keeps the others from saving
        os.kill(run.ranks()[1], signal.SIGSTOP)
        run.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGTERM)
        assert run.end(seconds=10) == 143
        assert run.ranks() == {}


def test_a_rank_that_hangs_ends_the_run_with_what_to_do(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = words_of(model, rows, folder, max_steps=10_000, ddp_timeout=12)
    with Run(words, tmp_path / "log", **TWO) as run:
        run.wait_until(lambda: newest(folder) >= 2)
        os.kill(run.ranks()[1], signal.SIGSTOP)
        assert run.end(seconds=50) == 1
        assert run.ranks() == {}
    assert run.said.count("rank 0: another process did not answer in time: it hangs") == 1
    assert "raise --ddp_timeout" in run.said
    steps = list_checkpoints(folder)
    assert find_fault(steps[max(steps)]) is None


def test_processes_save_for_their_launcher_and_end_with_it(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = words_of(model, rows, folder, max_steps=10_000, save_steps=10_000, logging_steps=1)
    with Run(words, tmp_path / "log", **TWO) as run:
        run.wait_until(lambda: (folder / "logging.jsonl").exists())
        run.process.send_signal(signal.SIGUSR1)
        run.wait_until(lambda: newest(folder))
        assert len(run.ranks()) == 2
        run.process.kill()
        begun = time.monotonic()
        while run.ranks():
            assert time.monotonic() - begun < 10
            time.sleep(0.05)
    steps = list_checkpoints(folder)
    assert find_fault(steps[max(steps)]) is None


def test_a_run_that_is_started_anew_takes_no_older_run_for_its_own(tmp_path: Path) -> None:
    first = World(run_id="this life", restarts=0)
    write_environment(tmp_path, first)
    assert is_of_start_before(tmp_path, replace(first, restarts=1))
    # the same start, as where one process trains twice
    assert not is_of_start_before(tmp_path, first)
    assert not is_of_start_before(tmp_path, World(run_id="another life", restarts=1))
    write_environment(tmp_path, World())
    assert not is_of_start_before(tmp_path, World(restarts=1))


def test_restarts_without_a_launcher_that_makes_them_are_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    words = words_of(model, rows, tmp_path / "run", max_restarts=1)
    with Run(words, tmp_path / "log", command=SFTCORE) as run:
        assert run.end() == 2
    assert "error: --max_restarts is of the launcher of sftcore" in run.said
