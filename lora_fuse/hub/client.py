"""The Hub client as the environment sets it up at each call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import naming_extras

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import HfApi


def endpoint() -> str:
    """The Hub to talk to: `HF_ENDPOINT`, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token() -> str | None:
    """The access token, from `HF_TOKEN` only: a build does not use a login that happens to be stored."""
    return os.environ.get("HF_TOKEN") or None


def is_offline() -> bool:
    """`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids the network."""
    return _is_on("HF_HUB_OFFLINE") or _is_on("TRANSFORMERS_OFFLINE")


def is_without_xet() -> bool:
    """`HF_HUB_DISABLE_XET` keeps transfers to plain HTTP."""
    return _is_on("HF_HUB_DISABLE_XET")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}  # as the client reads switches


def client() -> HfApi:
    """A Hub client for the endpoint and token of the environment."""
    with naming_extras("the Hub"):
        from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token() or False, library_name="lora-fuse")


def card_text(front_matter: Mapping[str, Any], body: str) -> str:
    """A model card of front matter and Markdown, made by the Hub's own class, which refuses what it cannot use."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**front_matter)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))
