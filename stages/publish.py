"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes."""

from __future__ import annotations

from lora_fuse.card import Usage, model_card
from lora_fuse.errors import PublishRefused
from lora_fuse.files import replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.publishing import publish as push
from lora_fuse.publishing import skipped
from lora_fuse.records import to_json
from stages.artifacts import MANIFEST, MERGED, METRICS, RECEIPT, VERIFY, read_object
from stages.config import run_stage
from stages.gate import decide
from stages.params import Params


def publish(params: Params) -> int:
    """Write `publish.json`, the receipt; with `publish.enabled: false` it says that nothing was sent."""
    manifest, manifest_sha256 = read_manifest(MANIFEST)
    settings = params.publish
    if not settings.enabled:
        replace_text(RECEIPT, to_json(skipped("publish.enabled is false", manifest_sha256)))
        print("publish: skipped, publish.enabled is false")
        return 0
    if settings.repo_id is None:
        raise PublishRefused("publish.enabled is true and publish.repo_id is null; name the repository: owner/name")
    verify, metrics = read_object(VERIFY, "verify"), read_object(METRICS, "regress")
    code, sentence = decide(verify, metrics)
    if code:
        raise PublishRefused(f"the gate is not passed: {sentence}")
    if verify["manifest_sha256"] != manifest_sha256:
        raise PublishRefused(f"{VERIFY} is about other bytes than {MANIFEST}; check these first: dvc repro")
    usage = Usage(params.base.pipeline, **params.sampling.usage, condition_area=params.base.condition_area)
    card = model_card(manifest, usage=usage, verdict=metrics["verdict"], repo_id=settings.repo_id)
    message = f"{manifest.recipe}, scale {manifest.scale:g}, by lora-fuse {manifest.tool.version}"
    receipt = push(MERGED, manifest, card, repo_id=settings.repo_id, private=settings.private, message=message)
    replace_text(RECEIPT, to_json(receipt))
    print(f"publish: {receipt.status}: {receipt.repo_id}@{receipt.commit}")
    return 0


if __name__ == "__main__":
    run_stage(publish)
