"""Names of data sets to files: syntax, folders, patterns, names, columns, and the command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sftcore.cli import main
from sftcore.data import DatasetSource, ModelNames, open_registry, resolve_sources
from sftcore.data.registry import packaged_entries, register_dataset
from sftcore.errors import ConfigError, RowError
from source_files import bare, files_of, info, one, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("bare")


def test_a_number_behind_a_name_draws_rows() -> None:
    write("rows.jsonl")
    assert one("rows.jsonl#1000") == DatasetSource(
        name="rows.jsonl", files=(Path("rows.jsonl"),), sample=1000
    )
    assert one("rows.jsonl").sample is None
    assert one("everyday#7").sample == 7


@pytest.mark.parametrize(
    "name", ["a#5", "a#5.jsonl", "b:c.jsonl", "d*[x].jsonl", "hf::x", "100%", "é 名"]
)
def test_a_path_that_exists_goes_before_every_other_reading(name: str) -> None:
    write(name)
    assert one(name) == DatasetSource(name=name, files=(Path(name),))
    assert one(f"{name}#3") == DatasetSource(name=name, files=(Path(name),), sample=3)


def test_a_path_that_hides_a_name_is_said() -> None:
    write("gsm8k/rows.jsonl")
    source = one("gsm8k")
    assert source.files == (Path("gsm8k/rows.jsonl"),)
    assert source.notes == ('gsm8k: is a path here, so the data set "gsm8k" is not meant',)


def test_the_standard_input_is_a_file_of_its_own() -> None:
    assert one("-") == DatasetSource(name="-", files=(Path("-"),))
    assert one("-#5").sample == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a data set is an empty text"),
        ("rows.jsonl#", 'rows.jsonl#: "#" draws no number of rows'),
        ("rows.jsonl#x", '"#x" draws no number of rows'),
        ("rows.jsonl#0", '"#0" draws no number of rows'),
        ("rows.jsonl#-1", '"#-1" draws no number of rows'),
        ("rows.jsonl#٣", "draws no number of rows"),
        ("rows.jsonl#" + "9" * 5000, "draws no number of rows"),
        ("xx::a/b", '"xx::" is no hub; expected hf:: or ms::'),
        ("hf::a/b/c", '"a/b/c" is no id of a hub'),
        ("hf::../b", '"../b" is no id of a hub'),
        ("gsm8k:", "a subset is missing"),
        ("gsm8k:main//x", "a subset is missing"),
        ("gsm9k", 'dataset "gsm9k" is unknown: .*; did you mean gsm8k\\?'),
        ("gsm8k:man", 'has no subset "man"; expected main, socratic or all; did you mean main\\?'),
        ("everyday:x", "is made of files, so it has no subsets"),
        ("no/*.jsonl", r"no/\*.jsonl: no file matches; expected files of rows"),
        ("[", r"\[: no file matches"),
        ("s3://host/rows.jsonl", "s3:// is not fetched from; expected http:// or https://"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        resolve_sources([text])


@pytest.mark.parametrize(
    "text",
    [r"C:\data\rows.jsonl", "C:/data/rows.jsonl", r"..\rows.jsonl", "./rows", "a/b/c", "rows.jsonl", "~nobody/rows.txt",
     "rows.jsonl:x", "a\0b/c", "n" * 5000 + ".jsonl", "/nowhere/rows.parquet", "data/rows.jsonl"],
)  # fmt: skip
def test_a_path_that_is_not_there_is_a_missing_file(text: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve_sources([text])


def test_a_missing_file_has_a_near_name() -> None:
    write("data/train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"did you mean train\.jsonl"):
        resolve_sources(["data/trian.jsonl"])


def test_a_path_object_is_a_path_alone() -> None:
    with pytest.raises(FileNotFoundError):
        resolve_sources([Path("everyday")])


def test_a_folder_is_its_files_in_order() -> None:
    write(
        "d/b.jsonl",
        "d/a/z.csv",
        "d/a/c.jsonl.gz",
        "d/c.parquet",
        "d/.hidden/x.jsonl",
        "d/.y.jsonl",
        "d/README.md",
    )
    source = one("d#9")
    assert [file.as_posix() for file in source.files] == [
        "d/a/c.jsonl.gz",
        "d/a/z.csv",
        "d/b.jsonl",
        "d/c.parquet",
    ]
    assert source.sample == 9
    assert source.notes == (
        "d: 3 of 7 files are left out: .hidden/x.jsonl (hidden), .y.jsonl (hidden), README.md (of no known kind)",
    )


def test_many_files_left_out_are_one_short_note() -> None:
    write("d/a.jsonl", *(f"d/{number}.bin" for number in range(50)))
    (note,) = one("d").notes
    assert note.startswith("d: 50 of 51 files are left out: 0.bin")
    assert note.endswith(" and 45 more")


def test_a_folder_without_rows_is_an_error() -> None:
    write("d/x.arrow")
    Path("empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"x.arrow \(of no known kind\); expected files of rows \(.jsonl"
    ):
        resolve_sources(["d"])
    with pytest.raises(ConfigError, match="empty: the folder is empty"):
        resolve_sources(["empty"])


def test_a_folder_that_links_to_itself_ends() -> None:
    write("d/a.jsonl")
    Path("d/again").symlink_to("../d")
    Path("d/gone.jsonl").symlink_to("nowhere")
    source = one("d")
    assert source.files == (Path("d/a.jsonl"),)
    assert source.notes == ("d: 1 of 2 files are left out: gone.jsonl (no regular file)",)


def test_a_pattern_is_its_files_in_order() -> None:
    write("d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl", "d/x.bin", "d/.h.jsonl")
    assert files_of("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert files_of("d/**/*.jsonl#3") == ["d/a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]
    assert files_of("d/[ab].jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert one("d/*").notes == (
        "d/*: 2 of 4 files are left out: d/e (a folder; name it, or match what is in it), d/x.bin (of no known kind)",
    )


def test_a_file_named_twice_is_said() -> None:
    write("d/a.jsonl", "d/b.jsonl")
    first, second = resolve_sources(["d", "d/a.jsonl"])
    assert first.notes == ()
    assert second.notes[0].startswith("d/a.jsonl: 1 of its files are in d too")


def test_a_bundled_name_is_its_file() -> None:
    source = one("everyday")
    assert source.name == "everyday"
    assert json.loads(source.files[0].read_text(encoding="utf-8").splitlines()[0])["query"]


def test_self_cognition_is_filled_with_names() -> None:
    names = ModelNames(model_name=("小松", "Sofie"), model_author=("松果实验室", "Pinecone Lab"))
    source = one("self-cognition#20", names=names)
    text = source.files[0].read_text(encoding="utf-8")
    assert "{{" not in text
    for row in map(json.loads, text.splitlines()):
        wrong = "Sofie" if row["language"] == "zh" else "小松"
        assert wrong not in row["response"]
    assert "Sofie" in text
    assert "小松" in text
    assert one("self_cognition", names=names).files == source.files
    with pytest.raises(ConfigError, match="self-cognition needs --model_name and --model_author"):
        resolve_sources(["self-cognition"])


def test_a_name_is_found_by_alias_case_and_dashes() -> None:
    found = open_registry().find
    assert found("alpaca-gpt4-zh") is found("Alpaca_ZH") is found("alpaca-zh") is not None


def test_the_packaged_names_are_whole_and_their_own() -> None:
    entries = packaged_entries()
    names = [name for entry in entries for name in (entry.name, *entry.aliases)]
    assert len(names) == len({name.lower().replace("_", "-") for name in names})
    assert len(entries) > 60
    for entry in entries:
        assert entry.description, entry.name
        assert entry.language, entry.name
        assert set(entry.subset) <= {*entry.subsets, "all"} or not entry.subsets, entry.name
        assert not set(entry.columns) & set(entry.join), entry.name


def test_a_name_of_code_is_known_here_and_goes_first(tmp_path: Path) -> None:
    write("rows.jsonl")
    register_dataset("mine", files="rows.jsonl", columns={"ask": "query"}, weight=2, sample=4)
    register_dataset("everyday", files=Path("rows.jsonl"))
    source = one("mine")
    assert source.files == (Path.cwd() / "rows.jsonl",)
    assert (source.columns, source.weight, source.sample) == ({"ask": "query"}, 2.0, 4)
    assert one("mine#2").sample == 2
    assert one("everyday").files == source.files
    with pytest.raises(ConfigError, match='"mine" is registered already'):
        register_dataset("mine", files="rows.jsonl")
    register_dataset("mine", files="other.jsonl", replace_existing=True)
    with pytest.raises(
        FileNotFoundError,
        match=r'other.jsonl: no such file, which register_dataset names for .*"mine"',
    ):
        resolve_sources(["mine"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "has no rows; expected files, hf_id or ms_id"),
        ({"files": []}, "has no rows"),
        ({"files": "a", "columns": {"a": 1}}, "columns is .*; expected texts for texts"),
        ({"files": "a", "columns": ["a"]}, "expected texts for texts"),
        ({"files": "a", "weight": -1}, "weight is -1; expected a number over 0"),
        ({"files": "a", "weight": float("nan")}, "weight is nan"),
        ({"files": "a", "sample": True}, "sample is True; expected a number of rows from 1"),
        ({"files": "a", "join": {"response": "{a.b}"}}, None),
        ({"files": "a", "join": {"response": "{a!r}"}}, "expected names of keys in braces"),
        ({"files": "a", "join": {"response": "{}"}}, "expected names of keys in braces"),
        ({"files": "a", "join": {"response": "{a"}}, "expected '}'"),
        ({"hf_id": 3}, "hf_id is 3; expected a text"),
    ],
)
def test_a_wrong_entry_is_named(values: dict[str, Any], message: str | None) -> None:
    if message is None:  # a dot is part of the key, and reaches into nothing
        write("a.jsonl")
        register_dataset("x", **{**values, "files": "a.jsonl"})
        with pytest.raises(RowError, match=r'the row has no "a\.b"'):
            resolve_sources(["x"])
        return
    with pytest.raises(ConfigError, match=f'register_dataset: data set "x":? .*{message}'):
        register_dataset("x", **values)


def test_a_name_has_no_mark_of_the_syntax() -> None:
    with pytest.raises(ConfigError, match="has neither # nor :"):
        register_dataset("a:b", files="a")


def test_keys_are_joined_row_by_row() -> None:
    rows = [
        {"input": "1 + 1?", "output": "{answer} is two", "answer": 2, "id": "\ud800"},
        {"input": "七", "output": "is", "answer": "7"},
    ]
    for name, text in {
        "rows.jsonl": "\n".join(json.dumps(row) for row in rows),
        "rows.json": json.dumps(rows, indent=1),
        "flat.json": json.dumps(rows),
    }.items():
        Path(name).write_text(text, encoding="utf-8")
        register_dataset(
            "joined",
            files=name,
            join={"response": "{output}\n\nAnswer: {answer} {{}}"},
            replace_existing=True,
        )
        source = one("joined")
        joined = [
            json.loads(line) for line in source.files[0].read_text(encoding="utf-8").splitlines()
        ]
        assert joined == [
            {**rows[0], "response": "{answer} is two\n\nAnswer: 2 {}"},
            {**rows[1], "response": "is\n\nAnswer: 7 {}"},
        ]
        assert one("joined").files == source.files
    Path("rows.jsonl.gz").write_bytes(gzip.compress(Path("rows.jsonl").read_bytes()))
    register_dataset("packed", files="rows.jsonl.gz", join={"response": "{answer}"})
    assert len(one("packed").files[0].read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"a": 1}\n\n{"b": 1}', r'r.jsonl:3: the row has no "a" \(found keys: b\)'),
        ("r.jsonl", '{"a": null}', '"a" is null; expected a text or a number'),
        ("r.jsonl", "[", "breaks off"),
        ("r.jsonl", "3", "a row is of type int"),
        ("r.jsonl", '{"a": 1}\n{', "r.jsonl:2: not JSON"),
        ("r.jsonl", '{"a": 1, "a": 2}', 'the key "a" stands twice'),
        ("r.jsonl", '{"a": NaN}', "NaN is no JSON number"),
        ("r.jsonl", '{"a": ' + "[" * 100_000, "not JSON"),
        ("r.jsonl", "\udcff", "cannot be read"),
        ("r.json", '[{"a": 1},\n{"a": 2}', "r.json:2: the array breaks off"),
        ("r.json", '[{"a": 1}\n{"a": 2}]', "found '{' after '}'"),
        ("r.json", '[{"a": 1},]', "found ']' after ','"),
        ("r.json", '[{"a": 1', "breaks off"),
        ("r.json", "[1]", "found '1' after '\\['"),
        ("r.csv", "a\n1\n", "a file of kind .csv; expected .jsonl or .json"),
        ("r.jsonl.gz", "no gzip", "cannot be read"),
    ],
)
def test_rows_that_cannot_be_joined_are_named(name: str, content: str, message: str) -> None:
    Path(name).write_bytes(content.encode(errors="surrogateescape"))
    register_dataset("x", files=name, join={"response": "{a}"})
    with pytest.raises(RowError, match=message):
        resolve_sources(["x"])
    assert not list(Path("../cache").rglob("*.jsonl"))
    assert not list(Path("../cache").rglob("tmp*"))


def test_a_long_array_is_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftcore.data import rows

    expected = [{"a": "x" * number, "b": [{"c": "]},{"}]} for number in range(60)]
    Path("r.json").write_text("\n " + json.dumps(expected, indent=2), encoding="utf-8")
    for size in (1, 2, 7, 1000):
        monkeypatch.setattr(rows, "_BUFFER", size)
        read = list(rows.read_rows(Path("r.json")))
        assert [row for _, row in read] == expected
        lines = Path("r.json").read_text(encoding="utf-8").splitlines()
        assert all(lines[line - 1].strip().startswith("{") for line, _ in read)


def test_columns_of_the_run_go_to_what_has_none() -> None:
    write("rows.jsonl", "other.jsonl")
    register_dataset("own", files="other.jsonl", columns={"a": "query"})
    mine, own, bundled = resolve_sources(["rows.jsonl", "own", "everyday"], columns={"q": "query"})
    assert mine.columns == {"q": "query"}
    assert own.columns == {"a": "query"}
    assert own.notes == ("own: has columns of its own, so --columns does not apply to it",)
    assert not bundled.columns
    with pytest.raises(ConfigError, match="--columns has no effect: own have columns of their own"):
        resolve_sources(["own"], columns={"q": "query"})


def test_a_source_is_taken_as_it_is() -> None:
    source = DatasetSource(name="x", files=(Path("rows.jsonl"),), sample=3, columns={"a": "query"})
    assert one(source) == source


def test_data_sets_are_listed_searched_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datasets", "list", "--tag", "math", "--language", "zh"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "blossom-math-zh",
        "school-math-zh",
    ]
    assert main(["datasets", "search", "AI-ModelScope/alpaca", "zh"]) == 0
    assert capsys.readouterr().out.startswith("alpaca-zh  ")
    assert main(["datasets", "show", "blossom_math_zh"]) == 0
    shown = capsys.readouterr().out
    assert "  columns        input as query\n" in shown
    assert "  joined         response = '{output}\\n\\nAnswer: {answer}'\n" in shown
    assert main(["datasets", "show", "everyday"]) == 0
    assert capsys.readouterr().out.endswith("everyday.jsonl: query, response, language\n")
    assert main(["datasets", "show", "nothing-like-it"]) == 2
    assert main(["datasets", "search", "nothing like it"]) == 2
    assert main(["datasets", "list", "--tag", "none"]) == 2


def test_ones_own_data_sets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    write("info/rows.json")
    Path("info/table.csv").write_text("question,answer\n1,2\n", encoding="utf-8")
    paths = info({"mine": {"files": ["rows.json", "table.csv"], "notes": "made by hand"}})
    assert main(["datasets", "show", "mine", "--dataset-info", *paths]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "  note: made by hand",
        "  info/rows.json: query, response",
        "  info/table.csv: question, answer",
    ]
    assert main(["datasets", "show", "info"]) == 0
    assert "describes" not in capsys.readouterr().out


def test_the_command_teaches_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "search", "show"):
        with pytest.raises(SystemExit):
            main(["datasets", action, "--help"])
        assert "example:" in capsys.readouterr().out
