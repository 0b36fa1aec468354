"""A user's own file of data sets, in each of its forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftcore.data import open_registry, resolve_sources
from sftcore.errors import ConfigError
from source_files import bare, info, one, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("info/data.toml", '[mine]\nfiles = ["rows.jsonl", "more"]\ncolumns = {ask = "query"}\nweight = 0.5\n'),
        ("info/data.json", '{"mine": {"files": ["rows.jsonl", "more"], "columns": {"ask": "query"}, "weight": 0.5}}'),
        ("info/data.yaml", "mine:\n  files: [rows.jsonl, more]\n  columns: {ask: query}\n  weight: 0.5\n"),
    ],
)  # fmt: skip
def test_a_file_names_data_sets_beside_it(name: str, text: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    write("info/rows.jsonl", "info/more/b.jsonl", "info/more/a.jsonl")
    source = one("mine", dataset_info=info(text, name))
    assert [file.as_posix() for file in source.files] == [
        "info/rows.jsonl",
        "info/more/a.jsonl",
        "info/more/b.jsonl",
    ]
    assert (source.columns, source.weight) == ({"ask": "query"}, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": {"file": "a"}}, 'data set "x": unknown key "file"; did you mean files\\?'),
        ({"x": {"file_name": "a", "colums": {}}}, 'unknown key "colums"; did you mean columns\\?'),
        ({"x": {"file_name": "a", "columns": {"promt": "b"}}}, 'columns: unknown key "promt"; did you mean prompt\\?'),
        ({"x": {"file_name": "a", "tags": {"role": "b"}}}, 'tags: unknown key "role"'),
        ({"x": {"file_name": "a", "formatting": "chatml"}}, "expected alpaca, sharegpt or openai"),
        ({"x": {"script_url": "a.py"}}, "script_url 'a.py' cannot be read"),
        ({"x": {"file_name": "a", "num_samples": 0}}, "sample is 0; expected a number of rows"),
        ({"x": 3}, 'data set "x" is 3; expected what it is by key'),
        (3, "expected data sets by name, or a list of them, found int"),
        ([3], r"\[0\] is 3"),
        ([{"ms_dataset": "a/b"}], 'unknown key "ms_dataset"; did you mean ms_dataset_id'),
        ([{"ms_dataset_id": "a/b", "subsets": [{"name": "x"}]}], "expected a list of names"),
        ([{"hf_dataset_id": "a/b", "split": ["train", "test"]}], "expected one; give each an entry of its own"),
        ([{"tags": ["x"]}], "has no name"),
        ([{"hf_dataset_id": "a/b"}, {"ms_dataset_id": "a/b"}], 'the name "a/b" stands twice'),
        ('{"x": {"files": "a"}, "x": {"files": "b"}}', 'the key "x" stands twice'),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_data_sets_is_named(content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^info/data.json: .*{message}"):
        open_registry(info(content))


def test_a_missing_or_odd_file_of_data_sets_is_named() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"none.json: no such file of data sets; check --dataset_info"
    ):
        open_registry(["none.json"])
    with pytest.raises(
        ConfigError, match=r"expected a file of data sets as .toml, .json, .yaml or .yml"
    ):
        open_registry(info("", "info/data.txt"))
    with pytest.raises(ConfigError, match=r"info/data\.toml: not TOML"):
        open_registry(info("x = ", "info/data.toml"))


@pytest.mark.parametrize(
    ("entry", "columns"),
    [
        ({}, {}),
        ({"columns": {"prompt": "ask", "response": "say"}}, {"ask": "query", "say": "response"}),
        (
            {"columns": {"prompt": "a", "query": "b", "response": "c", "system": "d", "history": "e"}},
            {"a": "instruction", "b": "input", "c": "output", "d": "system", "e": "history"},
        ),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output"}}, {}),
        ({"columns": {"prompt": "content"}}, {"content": "text"}),
        ({"columns": {"prompt": "text"}}, {}),
        ({"formatting": "sharegpt"}, {}),
        ({"formatting": "sharegpt", "columns": {"messages": "talk"}}, {"talk": "conversations"}),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk"},
                "tags": {"role_tag": "role", "content_tag": "content"},
            },
            {"talk": "messages"},
        ),
        (
            {"formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "me"}},
            {"tags": {"role_tag": "who", "content_tag": "text", "user_tag": "me"}},
        ),
        (
            {"formatting": "openai", "columns": {"messages": "chat", "tools": "functions"}},
            {"chat": "messages", "functions": "tools"},
        ),
    ],
)  # fmt: skip
def test_columns_of_llamafactory_say_what_keys_stand_for(
    entry: dict[str, Any], columns: dict[str, Any]
) -> None:
    write("info/rows.json")
    source = one("x#2", dataset_info=info({"x": {"file_name": "rows.json", **entry}}))
    assert source.columns == columns
    assert source.files == (Path("info/rows.json"),)


def test_what_sft_does_not_use_is_said() -> None:
    write("info/rows.json")
    entry = {"file_name": "rows.json", "ranking": True, "num_samples": 5}
    entry["columns"] = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "images": "d",
        "kto_tag": "e",
    }
    source = one("x", dataset_info=info({"x": entry}))
    assert source.sample == 5
    assert [note.partition('"x"')[2] for note in source.notes] == [
        " holds preference pairs; SFT needs rows with one answer each",
        ': "e" (kto_tag) is not used',
        ": images are not read; the texts alone are trained",
    ]


def test_every_local_entry_of_the_real_file_resolves(shared_data: Path) -> None:
    path = shared_data / "datasets" / "llamafactory" / "dataset_info.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    found = open_registry([path])
    assert all(found.find(name) is not None for name in entries)
    local = {name: entry["file_name"] for name, entry in entries.items() if "file_name" in entry}
    resolved = 0
    for name, file in local.items():
        if (path.parent / file).is_file():
            assert one(name, dataset_info=[path]).files == (path.parent / file,)
            resolved += 1
        else:
            with pytest.raises(FileNotFoundError, match=file):
                resolve_sources([name], dataset_info=[path])
    assert resolved >= 9
    assert found.find("c4_demo").columns == {}  # type: ignore[union-attr]
    assert found.find("lmsys_chat").columns == {"conversation": "messages"}  # type: ignore[union-attr]
    assert found.find("starcoder_python").hub_folder == "python"  # type: ignore[union-attr]


def test_a_list_of_ms_swift_is_read() -> None:
    write("info/rows.jsonl")
    paths = info(
        [
            {"ms_dataset_id": "a/b", "hf_dataset_id": "c/d", "subsets": ["x", "y"], "columns": {"p": "query"}},
            {"dataset_path": "rows.jsonl", "dataset_name": "mine", "tags": ["chat"], "help": "ours"},
        ]
    )  # fmt: skip
    assert one("mine", dataset_info=paths).files == (Path("info/rows.jsonl"),)
    entry = open_registry(paths).find("a/b")
    assert entry is not None
    assert (entry.hf_id, entry.ms_id, entry.subset, entry.columns) == (
        "c/d",
        "a/b",
        ("x",),
        {"p": "query"},
    )
