"""The Hub client as the environment sets it up at each call, and where its cache keeps things."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import naming_extras

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def client() -> HfApi:
    """A Hub client for the endpoint and token of the environment."""
    with naming_extras("the Hub"):
        from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token() or False, library_name="lora-fuse")


def bars_on_a_terminal() -> AbstractContextManager[object]:
    """Let the client show its progress bars on a terminal only."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    return nullcontext() if sys.stderr.isatty() else disable_progress_bars()


def card_text(front_matter: Mapping[str, Any], body: str) -> str:
    """A model card: front matter and Markdown, by the Hub's own reader, which refuses what it cannot use."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**front_matter)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))
