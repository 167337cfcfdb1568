"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes.

``python -m stages.publish --dry-run [overrides]`` prints what would be sent and the card, and sends nothing.
"""

from __future__ import annotations

import sys

from lora_fuse.card import Usage, model_card
from lora_fuse.errors import NoSpace, PublishRefused
from lora_fuse.files import replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.publishing import Receipt, preview, skipped
from lora_fuse.publishing import publish as push
from lora_fuse.records import Manifest, to_json
from lora_fuse.workplace import exclusive
from stages.artifacts import MANIFEST, MERGED, METRICS, RECEIPT, VERIFY, read_object
from stages.config import run_stage
from stages.gate import decide
from stages.params import Params


def publish(params: Params) -> int:
    """Write `publish.json`, the receipt; with `publish.enabled: false` it says that nothing was sent."""
    settings, (manifest, manifest_sha256) = params.publish, read_manifest(MANIFEST)
    with exclusive(RECEIPT):
        if not settings.enabled:
            return _finish(skipped("publish.enabled is false", manifest_sha256), "skipped, publish.enabled is false")
        if settings.repo_id is None:
            raise PublishRefused("publish.enabled is true and publish.repo_id is null; name the repository: owner/name")
        card, message = _checked(params, manifest, manifest_sha256)
        where = {"repo_id": settings.repo_id, "private": settings.private, "tag": settings.tag}
        receipt = push(MERGED, manifest, card, message=message, **where)  # type: ignore[arg-type]
        return _finish(receipt, f"{receipt.status}: {receipt.repo_id}@{receipt.commit}")


def dry_run(params: Params) -> int:
    """Print what `publish` would send."""
    manifest, manifest_sha256 = read_manifest(MANIFEST)
    card, _ = _checked(params, manifest, manifest_sha256)
    print(preview(MERGED, manifest, card, repo_id=params.publish.repo_id, tag=params.publish.tag))
    return 0


def _checked(params: Params, manifest: Manifest, manifest_sha256: str) -> tuple[str, str]:
    """The card and the commit's title, if `verify` and `gate` passed for these very bytes."""
    verify, metrics = read_object(VERIFY, "verify"), read_object(METRICS, "regress")
    code, sentence = decide(verify, metrics)
    if code:
        raise PublishRefused(f"the gate is not passed: {sentence}")
    if verify["manifest_sha256"] != manifest_sha256:
        raise PublishRefused(f"{VERIFY} is about other bytes than {MANIFEST}; check these first: dvc repro")
    usage = Usage(params.base.pipeline, **params.sampling.usage, condition_area=params.base.condition_area)
    card = model_card(manifest, usage=usage, verdict=metrics["verdict"], repo_id=params.publish.repo_id)
    return card, f"{manifest.recipe}, scale {manifest.scale:g}, by lora-fuse {manifest.tool.version}"


def _finish(receipt: Receipt, said: str) -> int:
    try:
        replace_text(RECEIPT, to_json(receipt))
    except OSError as error:
        raise NoSpace(f"{RECEIPT} cannot be written ({error.strerror}), {said}; make room and publish again") from error
    print(f"publish: {said}")
    return 0


if __name__ == "__main__":
    dry = "--dry-run" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--dry-run"]
    run_stage(dry_run if dry else publish)
