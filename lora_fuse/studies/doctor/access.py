"""Whether the Hub answers, and what the token may do; it is never shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fuse.errors import PublishRefused, Refused
from lora_fuse.hub import client, retry
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn
from lora_fuse.studies.doctor.stock import PATIENCE

WRITE = "repo.write"  # the Hub's name of the scope


def reach(refusals: Mapping[str, Refused], missing: int, *, used: bool) -> Finding:
    """Whether the Hub can be had, from what asking it for the sources came to.

    Args:
        refusals: by source, those that could not be known.
        missing: files that are not here.
        used: whether the recipe names a repository at all.
    """
    if not used:
        return ok("Hub", "not needed: base and LoRAs are local folders")
    if client.is_offline():
        if missing or refusals:
            return fail("Hub", "HF_HUB_OFFLINE is set and not all is here", "", "unset it once, for the download")
        return ok("Hub", "HF_HUB_OFFLINE is set, and everything is here")
    for refusal in refusals.values():
        if getattr(refusal.__cause__, "response", None) is None and refusal.__cause__ is not None:
            return fail("Hub", f"{client.endpoint()} does not answer", "", "check the connection, or HF_ENDPOINT")
    asked = "answers" if missing or refusals else "is not needed: everything is here"
    return ok("Hub", f"{client.endpoint()} {asked}")


def token(*, needed: bool, publishes: bool) -> Finding:
    """Whose token `HF_TOKEN` is and what it may do, asked of the Hub.

    Args:
        needed: whether something is to be fetched.
        publishes: whether the recipe publishes.
    """
    if client.token() is None:
        if publishes:
            return warn("token", "HF_TOKEN is not set", "one that may write, for publish", "set it before publishing")
        return ok("token", "HF_TOKEN is not set; public repositories need none")
    if client.is_offline():
        return ok("token", "HF_TOKEN is set; not asked about, as HF_HUB_OFFLINE is set")
    retry.bound_requests(PATIENCE)
    try:
        account = retry.call("HF_TOKEN", "", lambda: client.client().whoami())
    except PublishRefused as refusal:
        how = fail if needed or publishes else warn
        return how("token", f"HF_TOKEN is set and not good: {refusal}", "", "renew it, or unset it for what is public")
    return rights(account, publishes=publishes)


def rights(account: Mapping[str, Any], *, publishes: bool) -> Finding:
    """What the Hub's answer about a token (``/api/whoami-v2``) means for a recipe."""
    held = account.get("auth", {}).get("accessToken", {})
    role, scoped = held.get("role", "unknown"), held.get("fineGrained", {}).get("scoped", [])
    scopes = {scope for one in scoped for scope in one.get("permissions", [])}
    said = f"HF_TOKEN is {account.get('name')}'s, role {role}" + (f": {', '.join(sorted(scopes))}" if scopes else "")
    if publishes and not (role == "write" or WRITE in scopes):
        return fail("token", said, "the right to write, for publish", f"use a token with the role write or {WRITE}")
    return ok("token", said)
