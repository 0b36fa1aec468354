"""Hubs and the web: which files of a repository are fetched, from where, and what is said where that fails."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sftcore.data import resolve_sources
from sftcore.data.choose import choose_files
from sftcore.data.registry import register_dataset
from sftcore.errors import ConfigError
from source_files import ROW, bare, one, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        ("README.md train.jsonl test.jsonl", {}, "train.jsonl"),
        ("data/train-00000-of-00002-ab.parquet data/train-00001-of-00002-cd.parquet data/test-00000-of-00001.csv", {},
         "data/train-00000-of-00002-ab.parquet data/train-00001-of-00002-cd.parquet"),
        ("data/train_sft-00000-of-00001.parquet data/train_gen-00000-of-00001.parquet", {"split": "train_sft"},
         "data/train_sft-00000-of-00001.parquet"),
        ("main/train-0.parquet socratic/train-0.parquet main/test-0.parquet", {"subsets": ["main"]},
         "main/train-0.parquet"),
        ("main/train/0000.parquet socratic/train/0000.parquet", {"subsets": ["socratic"]},
         "socratic/train/0000.parquet"),
        ("a/train.json b/train.json c/train.json", {"subsets": ["c", "a"]}, "a/train.json c/train.json"),
        ("a/train.json b/train.json", {"subsets": ["all"]}, "a/train.json b/train.json"),
        ("default/train.json other/train.json", {}, "default/train.json"),
        ("best_train.jsonl best_eval.jsonl", {}, "best_train.jsonl"),
        ("alpaca_data.json dataset_infos.json .cache/x.json", {}, "alpaca_data.json"),
        ("part-0001.jsonl part-0002.jsonl", {}, "part-0001.jsonl part-0002.jsonl"),
        ("one.json two.json", {"subsets": ["two"]}, "two.json"),
        ("o1_sft.json o1_sft_zh.json", {"subsets": ["o1_sft"]}, "o1_sft.json"),
        ("train.jsonl train.csv train.parquet", {}, "train.jsonl"),
        ("python/a.parquet java/a.parquet", {"folder": "python"}, "python/a.parquet"),
        ("x/train.json y/test.json", {"split": "all", "subsets": ["all"]}, "x/train.json y/test.json"),
        ("train.json.gz valid.json.gz", {}, "train.json.gz"),
        ("../train.json /train.json train.json", {}, "train.json"),
    ],
)  # fmt: skip
def test_files_that_say_what_is_wanted_are_chosen(
    names: str, wanted: dict[str, Any], chosen: str
) -> None:
    assert choose_files(names.split(), origin="o/n", **wanted) == chosen.split()


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        ("load.py README.md", {}, r"o/n has no files of rows \(found: README.md, load.py\); .* script .* is never run"),
        ("", {}, "found: nothing"),
        ("a.json", {"folder": "b"}, "no files of rows in b"),
        ("main/train.json socratic/train.json", {}, "leaves open .* main/train.json, socratic/train.json; name some of "
         "them, like o/n:main, or all with o/n:all"),
        ("one.json two.json", {}, "leaves open .* like o/n:one"),
        ("main/train.json", {"subsets": ["mian"]}, 'has no subset "mian"; did you mean main\\?'),
        ("test.json", {}, r'has no split "train" \(found: test.json\)'),
        ("train.json", {"split": "validation"}, 'has no split "validation"'),
    ],
)  # fmt: skip
def test_what_is_left_open_is_an_error(names: str, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_files(names.split(), origin="o/n", **wanted)


class FakeHub:
    """Repositories of a hub that is reached through functions of its client."""

    def __init__(self, folder: Path, repositories: dict[str, list[str]]) -> None:
        self.folder = folder
        self.repositories = repositories
        self.fetched: list[str] = []

    def names(self, hub_id: str) -> list[str]:
        if hub_id not in self.repositories:
            raise OSError(f"404: no repository {hub_id}")
        return self.repositories[hub_id]

    def fetch(self, hub_id: str, patterns: list[str]) -> str:
        from fnmatch import fnmatch

        root = self.folder / hub_id.replace("/", "--")
        for name in self.names(hub_id):
            if any(fnmatch(name, pattern) for pattern in patterns):
                write(str(root / name))
                self.fetched.append(name)
        return str(root)


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    client = pytest.importorskip("huggingface_hub")
    hub = FakeHub(
        tmp_path / "hf",
        {
            "openai/gsm8k": ["README.md", "main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"],
            "a/odd": ["train[1].jsonl", "train1.jsonl.bak"],
            "Azure99/blossom-math-v2": ["blossom-math-v2.json"],
        },
    )  # fmt: skip

    def snapshot_download(
        repo_id: str, *, repo_type: str, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert repo_type == "dataset"
        assert not local_files_only
        return hub.fetch(repo_id, allow_patterns)

    def list_repo_files(self: object, repo_id: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        return hub.names(repo_id)

    monkeypatch.setattr(client, "snapshot_download", snapshot_download)
    monkeypatch.setattr(client.HfApi, "list_repo_files", list_repo_files)
    return hub


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    hub = FakeHub(
        tmp_path / "ms",
        {
            "modelscope/gsm8k": ["main/train.jsonl", "socratic/train.jsonl"],
            "a/many": [f"train-{number:05}-of-01200.jsonl" for number in range(1200)],
            "iic/ms_bench": ["train.jsonl"],
        },
    )

    class HubApi:
        def get_dataset_files(
            self, repo_id: str, *, page_number: int, page_size: int
        ) -> list[dict[str, str]]:
            names = hub.names(repo_id)
            page = names[(page_number - 1) * page_size : page_number * page_size]
            folders = (
                [{"Path": "main", "Type": "tree"}] if page_number == 1 and len(names) < 9 else []
            )
            return folders + [{"Path": name, "Type": "blob"} for name in page]

    def dataset_snapshot_download(dataset_id: str, *, allow_file_pattern: list[str]) -> str:
        return hub.fetch(dataset_id, allow_file_pattern)

    modules = {
        "modelscope": {},
        "modelscope.hub": {},
        "modelscope.hub.api": {"HubApi": HubApi},
        "modelscope.hub.snapshot_download": {
            "dataset_snapshot_download": dataset_snapshot_download
        },
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return hub


def test_a_name_fetches_just_the_wanted_files(huggingface: FakeHub) -> None:
    source = one("gsm8k#100")
    assert source.name == "gsm8k"
    assert [file.relative_to(huggingface.folder).as_posix() for file in source.files] == [
        "openai--gsm8k/main/train-0.parquet"
    ]
    assert source.sample == 100
    assert huggingface.fetched == ["main/train-0.parquet"]
    assert len(one("gsm8k:main/socratic").files) == 2
    assert len(one("gsm8k:all").files) == 2
    assert one("openai/gsm8k").files == one("hf::openai/gsm8k:main#5").files == source.files


def test_names_of_files_are_no_patterns(huggingface: FakeHub) -> None:
    assert [file.name for file in one("a/odd").files] == ["train[1].jsonl"]
    assert huggingface.fetched == ["train[1].jsonl"]


def test_the_hub_is_chosen_by_prefix_setting_and_environment(
    huggingface: FakeHub, modelscope: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub_of(dataset: str, **settings: Any) -> str:
        (file,) = one(dataset, **settings).files
        return "hf" if file.is_relative_to(huggingface.folder) else "ms"

    assert hub_of("gsm8k") == "hf"
    assert hub_of("gsm8k", use_hf=False) == "ms"
    assert hub_of("ms-bench") == "ms"
    assert hub_of("ms-bench", use_hf=True) == "ms"
    assert hub_of("modelscope/gsm8k") == "ms"
    assert hub_of("MS::modelscope/gsm8k") == "ms"
    monkeypatch.setenv("USE_HF", "0")
    assert hub_of("gsm8k") == "ms"
    assert hub_of("gsm8k", use_hf=True) == "hf"
    assert hub_of("hf::a/odd") == "hf"
    monkeypatch.delenv("USE_HF")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert hub_of("gsm8k") == "ms"


def test_every_page_of_a_listing_is_read(modelscope: FakeHub) -> None:
    assert len(one("ms::a/many").files) == 1200


def test_an_unknown_id_says_the_other_hub_and_local_files(huggingface: FakeHub) -> None:
    with pytest.raises(
        ConfigError,
        match=r"hf::no/such could not be fetched from the Hugging Face hub \(OSError: 404: no repository no/such\); "
        r"check the id and the network, say ms:: .*, or pass local files",
    ):
        resolve_sources(["no/such"])


def test_a_download_that_misses_files_is_an_error(
    huggingface: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ConfigError, match="1 of 1 files are missing after the download"):
        resolve_sources(["gsm8k"])


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    monkeypatch.setitem(sys.modules, "pooch", None)
    for dataset, package in {
        "gsm8k": "huggingface_hub",
        "ms::a/b": "modelscope",
        "http://127.0.0.1:1/rows.jsonl": "pooch",
    }.items():
        with pytest.raises(
            ConfigError, match=rf'the package {package}, .* run pip install "sftcore\[hub\]"'
        ):
            resolve_sources([dataset])


def test_offline_what_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        ConfigError,
        match=r"hf::openai/gsm8k is not on this machine, and HF_HUB_OFFLINE=1 keeps from asking the hub .*; fetch it "
        r"where there is a network, or pass local files: a folder of them is --dataset FOLDER",
    ):
        resolve_sources(["gsm8k"])


def test_blossom_math_is_joined_after_the_download(huggingface: FakeHub) -> None:
    root = huggingface.folder / "Azure99--blossom-math-v2"
    row = {"id": 1, "input": "1 + 1?", "output": "One and one.", "answer": "2", "dataset": "x"}

    def fetch(hub_id: str, patterns: list[str]) -> str:
        root.mkdir(parents=True)
        (root / "blossom-math-v2.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
        return str(root)

    huggingface.fetch = fetch  # type: ignore[method-assign]
    source = one("blossom-math-zh#1")
    assert source.columns == {"input": "query"}
    assert (
        json.loads(source.files[0].read_text(encoding="utf-8"))["response"]
        == "One and one.\n\nAnswer: 2"
    )


class _Handler(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path.startswith("/broken"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"{")
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, with the paths it was asked for."""
    pytest.importorskip("pooch")
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROW, encoding="utf-8")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(ROW.encode()))
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"requests": requests})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_of_the_web_is_fetched_once(web: tuple[str, list[str]]) -> None:
    address, requests = web
    source = one(f"{address}/rows.jsonl.gz#5")
    (file,) = source.files
    assert gzip.decompress(file.read_bytes()).decode() == ROW
    assert file.name.endswith("-rows.jsonl.gz")
    assert (source.name, source.sample) == (f"{address}/rows.jsonl.gz", 5)
    assert one(f"{address}/rows.jsonl.gz").files == source.files
    assert requests == ["/rows.jsonl.gz"]
    source = one(f"{address}/rows.jsonl?token=word")
    assert source.files[0].read_text(encoding="utf-8") == ROW
    assert source.name == f"{address}/rows.jsonl"


@pytest.mark.parametrize("path", ["/none.jsonl", "/broken.jsonl"])
def test_a_file_that_does_not_come_whole_leaves_nothing(
    web: tuple[str, list[str]], path: str
) -> None:
    address, _ = web
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=rf"^{address}{path} could not be fetched \(.*\); check the address"
        ):
            resolve_sources([address + path])
    assert [file for file in Path("../cache").rglob("*") if file.is_file()] == []


def test_an_address_that_names_no_rows_is_an_error(web: tuple[str, list[str]]) -> None:
    address, requests = web
    with pytest.raises(
        ConfigError, match=r'"page\.html" is no file of rows; expected an address that ends in'
    ):
        resolve_sources([f"{address}/page.html"])
    assert requests == []


def test_what_is_secret_in_an_address_is_not_shown() -> None:
    pytest.importorskip("pooch")
    with pytest.raises(ConfigError) as caught:
        resolve_sources(["http://user:word@127.0.0.1:1/rows.jsonl?token=word"])
    assert "word" not in str(caught.value)


def test_a_registered_address_is_fetched(web: tuple[str, list[str]]) -> None:
    register_dataset("far", files=f"{web[0]}/rows.jsonl")
    assert one("far").files[0].read_text(encoding="utf-8") == ROW
