"""Stage `publish`: push exactly the manifest's files to the Hub, if the checks passed for these very bytes.

With ``--dry-run`` it prints what would be sent, and sends nothing.
"""

from __future__ import annotations

from functools import partial

from lora_fuse import publishing
from lora_fuse.errors import PublishRefused
from lora_fuse.licences import settle
from lora_fuse.manifest import read_manifest
from lora_fuse.publishing.local import CARD, Addition
from lora_fuse.records import Manifest
from lora_fuse.release import write_release
from lora_fuse.workplace import exclusive
from stages.artifacts import MANIFEST, MERGED, METRICS, RECEIPT, RELEASE, VERIFY, read_object
from stages.config import run_stage
from stages.gate import decide
from stages.params import Params
from stages.releasing import contents_of


def publish(params: Params, *, dry_run: bool = False) -> int:
    """Write `publish.json`, the receipt; with `publish.enabled: false` it says that nothing was sent."""
    wanted = params.publish
    with exclusive(RECEIPT):
        if dry_run:
            manifest, card, beside = _checked(params)
            print(publishing.preview(MERGED, manifest, card, beside, repo_id=wanted.repo_id, tag=wanted.tag))
            return 0
        if not wanted.enabled:
            receipt = publishing.skipped("publish.enabled is false", read_manifest(MANIFEST)[1])
        elif wanted.repo_id is None:
            raise PublishRefused("publish.enabled is true and publish.repo_id is null; name the repository: owner/name")
        else:
            manifest, card, beside = _checked(params)
            title = f"{manifest.recipe}, scale {manifest.scale:g}, by lora-fuse {manifest.tool.version}"
            to = partial(publishing.publish, repo_id=wanted.repo_id, private=wanted.private, tag=wanted.tag)
            receipt = to(MERGED, manifest, card, beside, message=title)
        receipt.write(RECEIPT)
    print(f"publish: {receipt}")
    return 0


def _checked(params: Params) -> tuple[Manifest, str, dict[str, Addition]]:
    """The manifest, the card and what else is published, if `verify` and `gate` passed for these very bytes."""
    manifest, manifest_sha256 = read_manifest(MANIFEST)
    verify, metrics = read_object(VERIFY, "verify"), read_object(METRICS, "regress")
    code, sentence = decide(verify, metrics)
    if code:
        raise PublishRefused(f"the gate is not passed: {sentence}")
    if verify["manifest_sha256"] != manifest_sha256:
        raise PublishRefused(f"{VERIFY} is about other bytes than {MANIFEST}; check these first: dvc repro")
    licence = settle(manifest, params.publish.license)
    if licence.problem and not params.publish.private:
        raise PublishRefused(licence.problem)
    contents = contents_of(params, manifest, manifest_sha256, metrics, licence)
    beside = write_release(RELEASE, MERGED, manifest, contents, params.publish.signing.signer)
    return manifest, beside.pop(CARD)[0].read_text(encoding="utf-8"), beside


if __name__ == "__main__":
    run_stage(publish, "dry-run")
