"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes.

With ``--dry-run`` it prints what would be sent, and sends nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from lora_fuse import publishing
from lora_fuse.errors import PublishRefused
from lora_fuse.manifest import read_manifest
from stages.artifacts import HERE, Artifacts
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params
from stages.releasing import checked_release


def publish(params: Params, at: Artifacts = HERE, console: Console = PLAIN, *, dry_run: bool = False) -> int:
    """Write `publish.json`, the receipt; with `publish.enabled: false` it says that nothing was sent."""
    wanted = params.publish
    if dry_run:
        manifest, card, beside = checked_release(params, at)
        print(publishing.preview(at.merged, manifest, card, beside, repo_id=wanted.repo_id, tag=wanted.tag))
        return 0
    if not wanted.enabled:
        receipt = publishing.skipped("publish.enabled is false", read_manifest(at.manifest)[1])
    elif wanted.repo_id is None:
        raise PublishRefused("publish.enabled is true and publish.repo_id is null; name the repository: owner/name")
    else:
        manifest, card, beside = checked_release(params, at)
        title = f"{manifest.recipe}, scale {manifest.scale:g}, by lora-fuse {manifest.tool.version}"
        to = partial(publishing.publish, repo_id=wanted.repo_id, private=wanted.private, tag=wanted.tag)
        receipt = to(at.merged, manifest, card, beside, message=title)
    receipt.write(at.receipt)
    console.done("publish", str(receipt), facts=asdict(receipt))
    return 0


if __name__ == "__main__":
    run_stage(publish, "dry-run")
