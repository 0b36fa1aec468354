"""Rows that lie elsewhere to files here: the Hugging Face hub, the ModelScope hub, and the web.

The clients are those of the hubs themselves and pooch; each is imported when it is first needed, so
that local files need none. A hub's client keeps what it fetched in its own cache; a file of the web is
written under another name, renamed when it is whole, and kept in the cache folder.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from sftcore.config.folders import cache_folder
from sftcore.data.choose import choose_files
from sftcore.data.kinds import ROW_KINDS, kind_of
from sftcore.errors import ConfigError

Hub = Literal["hf", "ms"]

_NAMES = {"hf": "the Hugging Face hub", "ms": "the ModelScope hub"}
_LOCAL = "or pass local files: a folder of them is --dataset FOLDER"
_PAGE = 500
# seconds without a byte until a server counts as gone
_TIMEOUT = 60


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks to leave the Hugging Face hub alone."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def fetch_from_hub(
    hub: Hub,
    hub_id: str,
    *,
    subsets: Sequence[str] = (),
    split: str = "train",
    folder: str | None = None,
) -> list[Path]:
    """Fetches the files of one data set and returns where they are.

    Args:
        hub: `hf` or `ms`.
        hub_id: The id, like `owner/name`.
        subsets: The subsets that are wanted; see `choose_files`.
        split: The split that is wanted.
        folder: The folder of the repository that is looked into.

    Raises:
        ConfigError: The client is not installed, the hub cannot be reached or does not know the id, or no
            file fits.
    """
    asked = f"{hub}::{hub_id}"
    list_files, fetch = (
        (_list_huggingface, _fetch_huggingface)
        if hub == "hf"
        else (_list_modelscope, _fetch_modelscope)
    )
    try:
        names = list_files(asked, hub_id)
    except ConfigError:
        raise
    except Exception as error:
        # the clients let through whatever their transport raises
        raise _unreachable(hub, asked, error) from error
    chosen = choose_files(names, origin=asked, subsets=subsets, split=split, folder=folder)
    try:
        root = fetch(asked, hub_id, chosen)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreachable(hub, asked, error) from error
    files = [root / name for name in chosen]
    missing = [name for name, file in zip(chosen, files, strict=True) if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{asked}: {len(missing)} of {len(chosen)} files are missing after the download (the first: "
            f"{missing[0]}); run it again, {_LOCAL}"
        )
    return files


def fetch_url(url: str) -> Path:
    """Fetches one file of the web, once, and returns where it is.

    Raises:
        ConfigError: The client is not installed, the address names no file of rows, or the file cannot be
            had whole.
    """
    shown = shown_address(url)
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if kind_of(name) is None:
        raise ConfigError(
            f'{shown}: "{name}" is no file of rows; expected an address that ends in one of {", ".join(ROW_KINDS)}'
        )
    pooch = _client("pooch", shown)
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    safe = re.sub(r"[^\w.-]", "_", name)[-100:]
    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=_TIMEOUT
    )
    try:
        return Path(
            pooch.retrieve(
                url,
                known_hash=None,
                fname=f"{key}-{safe}",
                path=cache_folder() / "downloads",
                downloader=downloader,
            )
        )
    except (OSError, ValueError) as error:  # those of requests are OSErrors
        why = _without_secrets(f"{type(error).__name__}: {error}", url)
        raise ConfigError(
            f"{shown} could not be fetched ({_in_short(why)}); check the address and the network, {_LOCAL}"
        ) from error


def shown_address(url: str) -> str:
    """Returns an address without user, password and query, which may hold what is secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _without_secrets(text: str, url: str) -> str:
    parts = urlsplit(url)
    for secret in (parts.query, parts.netloc.rpartition("@")[0], parts.password):
        if secret:
            text = text.replace(secret, "…")
    return text


def _list_huggingface(asked: str, hub_id: str) -> list[str]:
    client = _client("huggingface_hub", asked)
    if is_offline():
        tree = client.get_cached_repo_tree(hub_id, repo_type="dataset")
        return [file.path for file in tree]
    names: list[str] = client.HfApi().list_repo_files(hub_id, repo_type="dataset")
    return names


def _fetch_huggingface(asked: str, hub_id: str, names: list[str]) -> Path:
    client = _client("huggingface_hub", asked)
    return Path(
        client.snapshot_download(
            hub_id,
            repo_type="dataset",
            allow_patterns=[glob.escape(name) for name in names],
            local_files_only=is_offline(),
        )
    )


def _list_modelscope(asked: str, hub_id: str) -> list[str]:
    api = _client("modelscope.hub.api", asked).HubApi()
    names: list[str] = []
    number = 1
    while page := api.get_dataset_files(hub_id, page_number=number, page_size=_PAGE):
        names += [entry["Path"] for entry in page if entry["Type"] != "tree"]
        if len(page) < _PAGE:
            break
        number += 1
    return names


def _fetch_modelscope(asked: str, hub_id: str, names: list[str]) -> Path:
    client = _client("modelscope.hub.snapshot_download", asked)
    return Path(
        client.dataset_snapshot_download(
            hub_id, allow_file_pattern=[glob.escape(name) for name in names]
        )
    )


def _client(module: str, asked: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f'{asked} needs the package {package}, which is not installed; run pip install "sftcore[hub]", {_LOCAL}'
        ) from error


def _unreachable(hub: Hub, asked: str, error: Exception) -> ConfigError:
    why = _in_short(f"{type(error).__name__}: {error}")
    if hub == "hf" and is_offline():
        return ConfigError(
            f"{asked} is not on this machine, and HF_HUB_OFFLINE=1 keeps from asking the hub ({why}); fetch it where "
            f"there is a network, {_LOCAL}"
        )
    other = "ms" if hub == "hf" else "hf"
    return ConfigError(
        f"{asked} could not be fetched from {_NAMES[hub]} ({why}); check the id and the network, say {other}:: in "
        f"front of an id of {_NAMES[other]}, {_LOCAL}"
    )


def _in_short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}…"
