"""The Hub client as the environment sets it up at each call."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import naming_extras
from lora_fuse.hub.wire.guard import guard
from lora_fuse.machine import text
from lora_fuse.recipe import hf_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from huggingface_hub import HfApi


cache_dir = hf_cache.cache_dir
# The client's settings, and the environment that they come from, while it is cut off; None takes a variable away.
CUT_OFF = {
    "HF_HUB_OFFLINE": True,
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
    "HF_TOKEN_PATH": os.devnull,
    "HF_STORED_TOKENS_PATH": os.devnull,
}
CUT_OFF_ENVIRONMENT = {
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"), "1"),
    "HF_TOKEN_PATH": os.devnull,
}


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


@contextmanager
def cut_off() -> Iterator[None]:
    """Within it, the client asks no Hub, and no library here finds a token: not the environment's, not a login's."""
    from huggingface_hub import constants  # reads the environment as it is imported, so now

    settings = {name: getattr(constants, name) for name in CUT_OFF}
    environment = {name: os.environ.get(name) for name in CUT_OFF_ENVIRONMENT}
    try:
        vars(constants).update(CUT_OFF)
        _set_environment(CUT_OFF_ENVIRONMENT)
        yield
    finally:
        vars(constants).update(settings)
        _set_environment(environment)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def client() -> HfApi:
    """A Hub client for the endpoint and token of the environment, guarded (`lora_fuse.hub.wire.guard`)."""
    with naming_extras("the Hub"):
        from huggingface_hub import HfApi

    guard(endpoint)

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
