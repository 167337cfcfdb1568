"""The Hub client as the environment sets it up at each call."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import naming_extras
from lora_fuse.machine import text
from lora_fuse.recipe import hf_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import HfApi


cache_dir = hf_cache.cache_dir


def endpoint() -> str:
    """The Hub that the client talks to (`HF_ENDPOINT`); an empty variable is as good as none."""
    return str(hf_cache.client_settings().ENDPOINT or "https://huggingface.co")


def token() -> str | None:
    """The access token, from `HF_TOKEN` only: a build does not use a login that happens to be stored."""
    return os.environ.get("HF_TOKEN") or None


def is_offline() -> bool:
    """True where the client is told to use no network (`HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`)."""
    return bool(hf_cache.client_settings().HF_HUB_OFFLINE)


def is_without_xet() -> bool:
    """True where the client is told to transfer by plain HTTP (`HF_HUB_DISABLE_XET`)."""
    return bool(hf_cache.client_settings().HF_HUB_DISABLE_XET)


def client() -> HfApi:
    """A Hub client for the endpoint and token of the environment."""
    with naming_extras("the Hub"):
        from huggingface_hub import HfApi

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_as_line)  # the same one is added once
    return HfApi(endpoint=endpoint(), token=token() or False, library_name="lora-fuse")


def _as_line(record: logging.LogRecord) -> bool:
    """Let the client, which passes a Hub's warnings on, log a line as all other lines are."""
    record.msg = text.line(record.getMessage())
    record.args = ()
    return True


def card_text(front_matter: Mapping[str, Any], body: str) -> str:
    """A model card of front matter and Markdown, made by the Hub's own class, which refuses what it cannot use."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(**front_matter)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))
