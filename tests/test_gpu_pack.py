"""`make gpu-pack`: its list, its limit, what it holds to be missing, and the data that it makes. No network."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

BENCHES = Path(__file__).parent.parent / "benches"
sys.path.insert(0, str(BENCHES))

pytest.importorskip("packaging")

from gpu_pack import add_data, add_files, clear, missing, show

from gpu.install import choose, install
from sftcore.data import Encoder


def wheel(folder: Path, name: str, *needs: str, tags: str = "py3-none-any") -> Path:
    distribution, version = name.split("==")
    path = folder / f"{distribution}-{version}-{tags}.whl"
    lines = [f"Name: {distribution}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    files = {
        f"{distribution}.py": "",
        f"{distribution}-{version}.dist-info/METADATA": "\n".join(
            ["Metadata-Version: 2.1", *lines]
        ),
        f"{distribution}-{version}.dist-info/WHEEL": f"Wheel-Version: 1.0\nTag: {tags}\n",
    }
    record = f"{distribution}-{version}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(record, "".join(f"{name},,\n" for name in [*files, record]))
    return path


def test_the_list_has_each_wheel_and_folder_with_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"wheels/a.whl": 3 << 20, "wheels/b.whl": 1 << 20, "tests/x/y.py": 1 << 19}
    sizes["tests/z.py"] = 1 << 19
    for name, size in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * size)
    assert show(tmp_path, most_bytes=5 << 20) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["3.00", "MiB", "wheels/a.whl"]
    assert sorted(lines[1:3]) == [["1.00", "MiB", "tests"], ["1.00", "MiB", "wheels/b.whl"]]
    assert lines[3][:2] == ["5.00", "MiB"]


def test_a_pack_over_the_limit_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big").write_bytes(b"\0" * ((1 << 20) + 1))
    assert show(tmp_path, most_bytes=1 << 20) == 1
    assert "is over 1 MiB and would not travel" in capsys.readouterr().err


def test_what_no_wheel_and_no_machine_has_is_missing(tmp_path: Path) -> None:
    wheels = [
        wheel(
            tmp_path,
            "one==1.0",
            "Two_Things>=2",
            "numpy",
            "absent>1",
            'old; python_version < "3.11"',
            'more; extra == "dev"',
        ),
        wheel(tmp_path, "two_things==1.5"),
    ]
    assert missing(wheels, ["numpy"]) == [
        "one needs Two_Things>=2, and the pack has 1.5",
        "one needs absent>1, which is neither here nor on the machine",
    ]
    assert missing(wheels[1:], []) == []


def test_only_a_pack_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / ".gpu"
    clear(out)
    (out / "wheels").mkdir()
    clear(out)
    assert [path.name for path in out.iterdir()] == ["pack.json"]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds something that is no pack"):
        clear(tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_the_check_and_the_tests_travel_without_what_was_compiled(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    for name in ("tests/__pycache__/a.pyc", "tests/sub/a.py", "one.py", "other.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    add_files(out, root, ["one.py", "tests"])
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"one.py", "tests/sub/a.py"}


def test_wheels_that_cannot_run_here_are_left_out_by_name(tmp_path: Path) -> None:
    wheels = [
        wheel(tmp_path, "alone==1"),
        wheel(tmp_path, "after==1", "reader", "alone"),
        wheel(tmp_path, "reader==1", "large_thing>=2", 'toml; python_version < "3"'),
        wheel(tmp_path, "other==1", tags="cp39-cp39-win32"),
    ]
    chosen, left_out = choose(wheels, lambda name: name == "numpy")
    assert chosen == wheels[:1]
    assert left_out == {
        "other-1-cp39-cp39-win32.whl": "made for another Python or machine",
        "reader-1-py3-none-any.whl": "needs large_thing, which is not on this machine",
        "after-1-py3-none-any.whl": "needs reader, which is not on this machine",
    }
    chosen, _ = choose(wheels, lambda name: name == "large_thing")
    assert chosen == wheels[:3]


def test_wheels_are_installed_into_an_empty_folder_without_a_network(tmp_path: Path) -> None:
    pack, site = tmp_path / "pack", tmp_path / "site-packages"
    (pack / "wheels").mkdir(parents=True)
    wheel(pack / "wheels", "alone==1")
    wheel(pack / "wheels", "lacks==1", "something-that-is-nowhere")
    site.mkdir()
    (site / "old.py").write_text("")
    found = install(pack, site)
    assert found["installed"] == ["alone-1-py3-none-any.whl"]
    assert list(found["left out"]) == ["lacks-1-py3-none-any.whl"]
    assert sorted(path.name for path in site.iterdir()) == ["alone-1.dist-info", "alone.py"]


def test_made_rows_have_a_token_a_word(tmp_path: Path) -> None:
    origin = add_data(tmp_path, tmp_path / "absent")
    assert origin.startswith("made on the spot")
    data = tmp_path / "data"
    rows = (data / "datasets" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(map(len, rows)) > 1_000_000
    encoder = Encoder.from_pretrained(data / "tokenizers" / "smollm2", max_length=512)
    for line in rows[:50]:
        row = json.loads(line)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        words = len(f"{row['question']} {row['answer']}".split())
        tokens = len(encoder.encode({"messages": messages}).input_ids)
        assert words < tokens < words + 40
