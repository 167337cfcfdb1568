"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes.

With ``--dry-run`` it prints what would be sent, and sends nothing.
"""

from __future__ import annotations

from lora_fuse import publishing
from lora_fuse.card import Usage, model_card
from lora_fuse.errors import PublishRefused
from lora_fuse.manifest import read_manifest
from lora_fuse.records import Manifest
from lora_fuse.workplace import exclusive
from stages.artifacts import MANIFEST, MERGED, METRICS, RECEIPT, VERIFY, read_object
from stages.config import run_stage
from stages.gate import decide
from stages.params import Params


def publish(params: Params) -> int:
    """Write `publish.json`, the receipt; with `publish.enabled: false` it says that nothing was sent."""
    wanted = params.publish
    with exclusive(RECEIPT):
        if not wanted.enabled:
            receipt = publishing.skipped("publish.enabled is false", read_manifest(MANIFEST)[1])
        elif wanted.repo_id is None:
            raise PublishRefused("publish.enabled is true and publish.repo_id is null; name the repository: owner/name")
        else:
            manifest, card, title = _checked(params)
            receipt = publishing.publish(
                MERGED, manifest, card, repo_id=wanted.repo_id, private=wanted.private, tag=wanted.tag, message=title
            )
        receipt.write(RECEIPT)
    print(f"publish: {receipt}")
    return 0


def dry_run(params: Params) -> int:
    """Print what `publish` would send."""
    (manifest, card, _), wanted = _checked(params), params.publish
    print(publishing.preview(MERGED, manifest, card, repo_id=wanted.repo_id, tag=wanted.tag))
    return 0


def _checked(params: Params) -> tuple[Manifest, str, str]:
    """The manifest, the card and the commit's title, if `verify` and `gate` passed for these very bytes."""
    manifest, manifest_sha256 = read_manifest(MANIFEST)
    verify, metrics = read_object(VERIFY, "verify"), read_object(METRICS, "regress")
    code, sentence = decide(verify, metrics)
    if code:
        raise PublishRefused(f"the gate is not passed: {sentence}")
    if verify["manifest_sha256"] != manifest_sha256:
        raise PublishRefused(f"{VERIFY} is about other bytes than {MANIFEST}; check these first: dvc repro")
    usage = Usage(params.base.pipeline, **params.sampling.usage, condition_area=params.base.condition_area)
    card = model_card(manifest, usage=usage, verdict=metrics["verdict"], repo_id=params.publish.repo_id)
    return manifest, card, f"{manifest.recipe}, scale {manifest.scale:g}, by lora-fuse {manifest.tool.version}"


if __name__ == "__main__":
    run_stage(publish, flags={"--dry-run": dry_run})
