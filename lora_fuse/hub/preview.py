"""What publishing would do, in words. Sends nothing, and needs no token that may write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fuse.errors import PublishRefused
from lora_fuse.hub.client import endpoint
from lora_fuse.hub.payload import open_payload
from lora_fuse.hub.remote import Remote, Repository
from lora_fuse.hub.retry import bound_requests
from lora_fuse.machine import progress

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_fuse.hub.payload import Addition, Payload
    from lora_fuse.recipe import Manifest


def preview(
    merged: Path,
    manifest: Manifest,
    card: str,
    beside: Mapping[str, Addition] | None = None,
    *,
    repo_id: str | None,
    tag: str | None,
) -> str:
    """Every file that would be in the repository, with what would happen to it, and the card.

    Args:
        merged: the folder that holds the manifest's files, and nothing else.
        manifest: what would be published.
        card: the repository's README.md.
        beside: what else would be published, as for `publish`.
        repo_id: where to; None if that is not known yet.
        tag: the tag that it would get, if any.

    Raises:
        PublishRefused: these files would not be published anywhere.
    """
    with open_payload(merged, manifest, card, beside) as ours:
        there, place = _look(repo_id)
        states = _states(ours, there)
        sent = [name for name, state in states.items() if state != "same"]
        size = sum(ours.files[name].size for name in sent)
        lines = [f"{states[name]:7} {record.size:>12} {record.sha256} {name}" for name, record in ours.files.items()]
    how = (
        f"{len(sent)} of {len(lines)} files, {progress.human_bytes(size)}, would be sent"
        if sent
        else "nothing would be sent"
    )
    tagged = f"; tag {tag}" if tag else ""
    return "\n".join([f"dry run: {place}", *lines, f"{how}{tagged}", "", "README.md:", "", card])


def _look(repo_id: str | None) -> tuple[Remote | None, str]:
    if repo_id is None:
        return None, "publish.repo_id is null, so nothing is compared"
    bound_requests()
    try:
        there = Repository(repo_id).read()
    except PublishRefused as refusal:
        return None, f"to {repo_id}, which cannot be read, so nothing is compared ({refusal})"
    return there, f"to {endpoint()}/{repo_id}, {'private' if there.private else 'public'}, at {there.commit}"


def _states(ours: Payload, there: Remote | None) -> dict[str, str]:
    if there is None:
        return dict.fromkeys(ours.files, "unknown")
    differing = ours.differences(there.files)
    return {
        name: "same" if name not in differing else "changed" if name in there.files else "new" for name in ours.files
    }
