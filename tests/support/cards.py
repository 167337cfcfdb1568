"""A merge on paper, and its card."""

from dataclasses import replace
from typing import Any

import yaml

from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.records import License, Lock, Manifest, MergedFile, MergedLora, Tool
from lora_fuse.recipe.sections import PublishParams, SigningParams, Weights
from lora_fuse.release.card import Evidence, ShownCase, Usage, model_card
from lora_fuse.release.licences import resolve_licence

COMMIT, SHA256 = "c" * 40, "5" * 64
APACHE, MIT = License("apache-2.0"), License("mit")
BASE = Lock("owner/base", None, "main", COMMIT, {"model_index.json": FileRecord(2, SHA256)}, APACHE)

LORA = MergedLora(
    "lightning", 0.8, SHA256, "lightning.safetensors", repo_id="other/lora", revision="d" * 40, license=APACHE
)

FILES = {
    "vae/model.safetensors": MergedFile(5, SHA256, "base"),
    "transformer/one.safetensors": MergedFile(5, "f" * 64, "fused"),
    "scheduler/scheduler_config.json": MergedFile(5, SHA256, "generated"),
}

RABBIT = ShownCase(
    name="rabbit",
    prompt="Make it | purple, *please*",
    seed=7,
    height=128,
    width=None,
    verdict="exact",
    to_golden="identical",
    to_unfused="61.5 dB",
    over_floor="0.93",
    picture="images/rabbit.png",
    inputs=("images/rabbit.input.png",),
)

EVIDENCE = Evidence("passed: every picture is the approved one", "cpu-somewhere", (RABBIT,), "images/blocks.png")
MANIFEST = Manifest(1, "edit_4steps", BASE, (LORA,), 0.8, 720, FILES)
TOOL = Tool("1.2.3", "abc1234", dirty=False)


def card(
    manifest: Manifest = MANIFEST,
    repo_id: str | None = "alice/edit",
    evidence: Evidence = Evidence("passed"),  # noqa: B008 (frozen)
    licence: str | None = None,
    **changes: Any,
) -> str:
    usage = replace(Usage("QwenImageEditPipeline", 4, 1.0, " ", None), **changes)
    settled = resolve_licence(manifest, licence)
    return model_card(manifest, usage=usage, evidence=evidence, licence=settled, tool=TOOL, publish=publishing(repo_id))


def publishing(
    repo_id: str | None, tag: str | None = None, key: str | None = None, weights: Weights = "full"
) -> PublishParams:
    """The parameters, not checked: the name may be anything."""
    signing = SigningParams(key=key, keyless=False)
    return PublishParams.model_construct(
        enabled=True,
        repo_id=repo_id,
        weights=weights,
        private=True,
        license=None,
        signing=signing,
        tag=tag,
    )


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(head)
    return content
