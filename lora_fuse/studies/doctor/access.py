"""Checks of the Hub: that it answers, and that the token may do what the recipe needs; the token is never shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fuse.errors import PublishRefused, Refused
from lora_fuse.hub import client, retry
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn

PATIENCE = 10.0  # seconds that the Hub may take to answer
WRITE = "repo.write"  # the Hub's name of the scope


def reach(refusals: Mapping[str, Refused], missing: int, *, used: bool) -> Finding:
    """Check that the Hub answers, from the results of asking it for the sources.

    `refusals` has, by source, the error of each that could not be known; `missing` counts the files that are not here.
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
    """Ask the Hub for the owner and the rights of `HF_TOKEN`.

    It is `needed` if something is to be fetched.
    """
    if client.token() is None:
        if publishes:
            return warn("token", "HF_TOKEN is not set", "one that may write, for publish", "set it before publishing")
        return ok("token", "HF_TOKEN is not set; public repositories need none")
    if client.is_offline():
        return ok("token", "HF_TOKEN is set; not asked about, as HF_HUB_OFFLINE is set")
    try:
        return retry.PUBLISH.call(
            "HF_TOKEN", "", lambda: rights(client.client().whoami(), publishes=publishes), within=PATIENCE
        )
    except PublishRefused as refusal:
        how = fail if needed or publishes else warn
        return how("token", f"HF_TOKEN is set and not good: {refusal}", "", "renew it, or unset it for what is public")


def rights(account: Mapping[str, Any], *, publishes: bool) -> Finding:
    """Compare the rights of a token, as the Hub states them (``/api/whoami-v2``), with what a recipe needs."""
    access = account.get("auth", {}).get("accessToken", {})
    role = access.get("role", "unknown")
    entities = access.get("fineGrained", {}).get("scoped", [])
    scopes = sorted({scope for entity in entities for scope in entity.get("permissions", [])})
    owner = f"HF_TOKEN is {account.get('name')}'s, role {role}" + (f": {', '.join(scopes)}" if scopes else "")
    if publishes and not (role == "write" or WRITE in scopes):
        return fail("token", owner, "the right to write, for publish", f"use a token with the role write or {WRITE}")
    return ok("token", owner)
