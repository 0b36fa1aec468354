"""`benches/gpu_check.py`: a part that hangs or dies is cut off, and the others run; all parts on a tiny shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).parent.parent / "benches"
sys.path.insert(0, str(BENCHES))

from gpu_pack import add_data

from gpu.cases import Cases, Refusal, Skip
from gpu.runner import SKIPPED, Part, run_parts


def part(name: str, code: str, *, seconds: float = 60.0) -> Part:
    return Part(name=name, command=[sys.executable, "-c", code], seconds=seconds)


def run(parts: list[Part], folder: Path, seconds: float = 100.0) -> dict[str, Any]:
    out = folder / "out.json"
    found = run_parts(parts, seconds=seconds, work=folder / "work", out=out, about={"a": 1})
    assert json.loads(out.read_text()) == {"a": 1, "parts": found}
    return found


def has_ended(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_that_dies_or_hangs_is_cut_off_and_the_rest_goes_on(tmp_path: Path) -> None:
    case = tmp_path / "work" / "hangs.json"
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time, pathlib\n"
        f'pathlib.Path({str(case)!r}).write_text(\'{{"first": {{"x": 1}}}}\')\n'
        "code = 'import time; time.sleep(600)'\n"
        f"pid = subprocess.Popen([sys.executable, '-c', code]).pid\n"
        f"pathlib.Path({str(child)!r}).write_text(str(pid))\n"
        "time.sleep(600)\n"
    )
    parts = [
        part("dies", "import os; print('last words', flush=True); os.abort()"),
        part("fails", "raise ValueError('no good')"),
        part("hangs", hangs, seconds=4.0),
        part("skips", f"print('needs a GPU'); raise SystemExit({SKIPPED})"),
        part("passes", "print('fine')"),
    ]
    begun = time.monotonic()
    found = run(parts, tmp_path)
    assert time.monotonic() - begun < 60
    statuses = {name: one["status"] for name, one in found.items()}
    assert statuses == {
        "dies": "failed",
        "fails": "failed",
        "hangs": "cut off",
        "skips": "skipped",
        "passes": "passed",
    }
    assert (found["dies"]["exit_code"], found["dies"]["words"]) == (-6, "last words")
    assert "ValueError: no good" in found["fails"]["words"]
    # what it had found before it hung is kept, and what it started is gone too
    assert found["hangs"]["cases"] == {"first": {"x": 1}}
    assert found["skips"]["words"] == "needs a GPU"
    assert has_ended(child.read_text())


def test_what_there_is_no_time_for_is_said_not_to_be_reached(tmp_path: Path) -> None:
    slow = "import time; time.sleep(600)"
    found = run([part("slow", slow), part("late", "print()")], tmp_path, seconds=4.0)
    assert found["slow"]["status"] == "cut off"
    assert found["late"] == {"status": "not reached"}


def test_what_a_part_started_in_a_session_of_its_own_ends_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    leaves = (
        "import subprocess, sys, pathlib\n"
        "code = 'import time; time.sleep(600)'\n"
        "pid = subprocess.Popen([sys.executable, '-c', code], start_new_session=True).pid\n"
        f"pathlib.Path({str(child)!r}).write_text(str(pid))\n"
    )
    assert run([part("leaves", leaves)], tmp_path)["leaves"]["status"] == "passed"
    begun = time.monotonic()
    while not has_ended(child.read_text()):
        assert time.monotonic() - begun < 30
        time.sleep(0.02)


def test_a_part_that_is_cut_off_says_what_it_did_not_come_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = tmp_path / "work" / "slow.json"
    slow = (
        "import sys, time, pathlib\n"
        f"sys.path.insert(0, {str(BENCHES)!r})\n"
        "from gpu.cases import Cases\n"
        f"cases = Cases(pathlib.Path({str(case)!r}), ['one', 'two'])\n"
        "cases.run('one', lambda: {'x': 1})\n"
        "cases.run('two', lambda: time.sleep(600))\n"
    )
    found = run([part("slow", slow, seconds=5.0)], tmp_path)["slow"]
    assert found["status"] == "cut off"
    assert found["cases"]["one"]["x"] == 1
    assert found["cases"]["two"] == {"status": "not reached"}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("slow: one: passed, x 1")
    assert shown[-1].endswith("; not reached: two")


def test_a_case_that_fails_leaves_the_others_to_run(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no good")

    def skip() -> dict[str, Any]:
        raise Skip("needs a GPU")

    def refuse() -> dict[str, Any]:
        raise Refusal("takes two processes")

    cases = Cases(tmp_path / "part.json", ["a", "b", "c", "d"])
    cases.run("a", skip)
    cases.run("b", refuse)
    cases.run("c", lambda: {"value": 2.0})
    assert cases.exit_code() == 0
    cases.run("d", fail)
    assert cases.exit_code() == 1
    found = json.loads((tmp_path / "part.json").read_text())
    assert found["a"] == {"status": "skipped", "reason": "needs a GPU"}
    assert found["b"] == {"status": "refused", "reason": "takes two processes"}
    assert (found["c"]["status"], found["c"]["value"]) == ("passed", 2.0)
    assert found["d"] == {"status": "failed", "error": "ValueError: no good"}
    alone = Cases(tmp_path / "alone.json", ["a"])
    alone.run("a", skip)
    assert alone.exit_code() == SKIPPED


def test_gaps_are_where_no_kernel_runs() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gpu.one_step import gaps

    # two overlap, one lies within another, and the last begins 3 after all have ended
    assert gaps([(10, 14), (0, 4), (2, 6), (3, 5), (6, 7), (17, 18)]) == (12, 6, 3)
    assert gaps([]) == (0, 0, 0)


def test_flops_are_those_of_the_matrices_that_a_token_goes_through(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and the whole shapes would be made for it")
    from gpu.shapes import flops_of, make_shape

    add_data(tmp_path / "pack", tmp_path / "absent")
    width, inner, heads, kv_heads, size, layers = 32, 48, 4, 2, 8, 2
    attention = width * size * (2 * heads + 2 * kv_heads)
    head = width * 49152
    given = {"tokens": 100.0, "trained_tokens": 40.0, "mean_length": 50.0}
    of_pairs = 6 * layers * heads * size * 50
    dense = make_shape("1B", tmp_path / "pack", tmp_path)
    matrices = layers * (attention + 3 * width * inner)
    for trains_all, each in ((False, 4), (True, 6)):
        found = flops_of(dense, trains_all=trains_all, **given)
        assert found == 100 * (each * matrices + of_pairs) + 40 * each * head
    # of 16 experts of 24 wide a token goes to 4, and the router sees all
    experts = make_shape("moe", tmp_path / "pack", tmp_path)
    matrices = layers * (attention + 16 * width + 4 * 3 * width * 24)
    found = flops_of(experts, trains_all=True, **given)
    assert found == 100 * (6 * matrices + of_pairs) + 40 * 6 * head


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_a_gpu_a_tiny_shape_goes_through_every_part(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for package in ("transformers", "peft", "deepspeed"):
        pytest.importorskip(package)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and the whole shapes would run on it")
    pack, out = tmp_path / "pack", tmp_path / "out.json"
    add_data(pack, tmp_path / "absent")
    paths = [str(BENCHES.parent / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHES / "gpu_check.py"), "--pack", str(pack)]
    command += ["--work", str(tmp_path / "work"), "--out", str(out)]
    command += ["--seconds", "1700", "--slack", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    parts = json.loads(out.read_text())["parts"]
    assert {part["status"] for part in parts.values()} <= {"passed", "skipped"}
    cases = {
        f"{name}: {case}": found
        for name, part in parts.items()
        for case, found in part["cases"].items()
    }
    for found in cases.values():
        assert found["status"] in ("passed", "skipped", "refused")
        assert found["status"] == "passed" or found["reason"]
    assert cases["switches: torch_compile"] == {"status": "skipped", "reason": "needs a GPU"}
    assert cases["equality: 0.5B: resumed and not interrupted"]["bit_for_bit"] is True
    assert cases["equality: DDP"]["is_wrapped"] is True
    assert cases["equality: FSDP2"]["status"] == "refused"
    assert cases["equality: ZeRO-2"]["group"] == "gloo, 1 process"
    assert cases["speed: lora 1B, 256 tokens, packed"]["tokens_per_second"] > 0
