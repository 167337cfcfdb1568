"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes."""

from __future__ import annotations

from functools import partial

from lora_fuse.errors import PublishRefused
from lora_fuse.files import replace_text
from lora_fuse.licences import settle
from lora_fuse.manifest import read_manifest
from lora_fuse.publishing import publish as push
from lora_fuse.publishing import skipped
from lora_fuse.records import to_json
from lora_fuse.release import CARD, write_release
from stages.artifacts import MANIFEST, MERGED, METRICS, RECEIPT, RELEASE, VERIFY, read_object
from stages.config import run_stage
from stages.gate import decide
from stages.params import Params
from stages.releasing import contents_of


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
    licence = settle(manifest, settings.license)
    if licence.problem and not settings.private:
        raise PublishRefused(licence.problem)
    contents = contents_of(params, manifest, manifest_sha256, metrics, licence)
    additions = write_release(RELEASE, MERGED, manifest, contents, settings.signing.signer)
    card, _ = additions.pop(CARD)
    message = f"{manifest.recipe}, scale {manifest.scale:g}, by lora-fuse {manifest.tool.version}"
    push_to = partial(push, repo_id=settings.repo_id, private=settings.private, message=message)
    receipt = push_to(MERGED, manifest, card.read_text(encoding="utf-8"), additional=additions)
    replace_text(RECEIPT, to_json(receipt))
    print(f"publish: {receipt.status}: {receipt.repo_id}@{receipt.commit}")
    return 0


if __name__ == "__main__":
    run_stage(publish)
