"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes.

With ``--dry-run`` it prints what would be sent, and sends nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from lora_fuse import hub
from lora_fuse.errors import PublishRefused
from lora_fuse.fusion import read_manifest
from lora_fuse.machine import Console, progress
from lora_fuse.recipe import Artifacts, Recipe, checkout, paths
from lora_fuse.release import checked_release
from stages.run import PLAIN, run_stage

KEPT = "what was sent stays in its pull request; publish again, it goes on with the rest"


def publish(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN, *, dry_run: bool = False) -> int:
    """Write `publish.json`, the receipt; with `publish.enabled: false` it says that nothing was sent."""
    wanted = recipe.publish
    clock = progress.Stopwatch()
    if dry_run:
        ready = checked_release(recipe, at)
        to = partial(hub.preview, repo_id=wanted.repo_id, tag=wanted.tag, hashed=ready.hashed, absent=ready.absent)
        preview = to(at.merged, ready.manifest, ready.card, ready.beside)
        if console.as_json:
            console.done("publish", facts={"dry_run": preview})
        else:
            console.rows(preview.split("\n"))
        return 0
    if not wanted.enabled:
        reason = "publish.enabled is false" if at.variant is None else "conf/variants.yaml gives it no repo_id"
        receipt = hub.Receipt.skipped(reason, read_manifest(at.manifest)[1])
    elif wanted.repo_id is None:
        raise PublishRefused("publish.enabled is true and publish.repo_id is null; name the repository: owner/name")
    else:
        ready = checked_release(recipe, at)
        title = f"{ready.manifest.recipe}, scale {ready.manifest.scale:g}, by lora-fuse {checkout.this_version()}"
        size = progress.human_bytes(sum(ready.sizes))
        console.will("publish", f"{len(ready.sizes)} files, {size}, to {wanted.repo_id}")
        receipt = hub.publish(
            at.merged,
            ready.manifest,
            ready.card,
            ready.beside,
            repo_id=wanted.repo_id,
            private=wanted.private,
            tag=wanted.tag,
            message=title,
            hashed=ready.hashed,
            absent=ready.absent,
        )
    receipt.write(at.receipt)
    took = f"{len(receipt.files)} files in {progress.human_seconds(clock.seconds)}, see {receipt.url}"
    lines = [str(receipt), took] if receipt.files else [str(receipt)]
    console.done("publish", *lines, facts=asdict(receipt) | {"seconds": clock.seconds})
    return 0


if __name__ == "__main__":
    run_stage(publish, "dry-run", kept=KEPT)
