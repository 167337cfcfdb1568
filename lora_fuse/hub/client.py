"""The Hub client as the environment sets it up at each call, and where its cache keeps things."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRUE = frozenset({"1", "ON", "YES", "TRUE"})  # as the client reads switches


def endpoint() -> str:
    """The Hub to talk to: `HF_ENDPOINT`, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token() -> str | None:
    """The access token, from `HF_TOKEN` only: a build does not use a login that happens to be stored."""
    return os.environ.get("HF_TOKEN") or None


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    return _is_on("HF_HUB_OFFLINE") or _is_on("TRANSFORMERS_OFFLINE")


def is_without_xet() -> bool:
    """Whether `HF_HUB_DISABLE_XET` keeps transfers to plain HTTP."""
    return _is_on("HF_HUB_DISABLE_XET")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in TRUE


def cache_dir() -> Path:
    """The Hub client's cache: the client's rules, but read at each call and not at import."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser().absolute()


def repository_folder(repo_id: str) -> Path:
    """Where the cache keeps a repository (huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    return cache_dir() / _folder_name(repo_id)


def locks_folder(repo_id: str) -> Path:
    """Where the client's locks on a repository's files lie: `ETAG.lock`, held while the file is fetched."""
    return cache_dir() / ".locks" / _folder_name(repo_id)


def snapshot_folder(repo_id: str, commit: str) -> Path:
    """Where the cache shows the files of a commit, by the same source."""
    return repository_folder(repo_id) / "snapshots" / commit


def _folder_name(repo_id: str) -> str:
    return f"models--{repo_id.replace('/', '--')}"


def client() -> HfApi:
    """A Hub client for the endpoint and token of the environment."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token() or False, library_name="lora-fuse")


def bars_on_a_terminal() -> AbstractContextManager[object]:
    """Let the client show its progress bars on a terminal only."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    return nullcontext() if sys.stderr.isatty() else disable_progress_bars()
