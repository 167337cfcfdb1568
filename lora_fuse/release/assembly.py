"""Release of a build: the results of its stages put together as card, provenance and bill of materials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_fuse.errors import PublishRefused, Rerun
from lora_fuse.fusion import read_build, read_manifest
from lora_fuse.hub import payload
from lora_fuse.machine import FileRecord
from lora_fuse.pictures import Case
from lora_fuse.recipe import Artifacts, Manifest, Recipe, checkout, paths, records
from lora_fuse.regression import candidates, gate, weight_check
from lora_fuse.release.block_plot import block_plot
from lora_fuse.release.bom import bom_json
from lora_fuse.release.card import Usage, model_card
from lora_fuse.release.contents import BOM, PROVENANCE, named, public_parameters, write_release
from lora_fuse.release.licences import MergeLicence, resolve_licence
from lora_fuse.release.named_files import hash_named
from lora_fuse.release.recipe_only import copy_name, left_out, smaller_copies
from lora_fuse.release.regression_evidence import (
    PLOT,
    judged_pictures,
    performance_metrics,
    shown_evidence,
    shown_exports,
    with_copies,
)
from lora_fuse.release.slsa import provenance_json

RECIPE = "recipe"
SECTIONS = {"name", "base", "loras", "fuse", "scheduler", "sampling", "export"}  # the result depends on these


def contents_of(
    params: Recipe,
    at: Artifacts,
    manifest: Manifest,
    manifest_sha256: str,
    metrics: Mapping[str, Any],
    licence: MergeLicence,
    tool: records.Tool,
) -> tuple[dict[str, bytes], dict[str, payload.Addition]]:
    """The files that are published beside the merged checkpoint: texts and plot made now, and those that lie here.

    Raises:
        PublishRefused: pictures are those of another merge, or were made from others.
    """
    cases = Case.of(params)
    exports = _exports(params, at, manifest_sha256)
    usage = Usage(params.base.pipeline, **params.sampling.usage, condition_area=params.base.condition_area)
    judged = records.from_json(candidates.Candidates, paths.read_text(at.candidates, "regress"), str(at.candidates))
    pictures = judged_pictures(cases, judged, manifest_sha256, at.images)
    blocks = [(row["block"], row["relative_norm"]) for row in paths.read_rows(at.blocks, "regress")]
    evidence = shown_evidence(metrics, weight_check.read_weight_check(at.verify), cases, PLOT if blocks else None)
    copies = smaller_copies(pictures) if params.publish.weights == RECIPE else {}
    if copies:
        evidence = with_copies(evidence)
        pictures = {}
    card = model_card(
        manifest,
        usage=usage,
        evidence=replace(evidence, exports=shown_exports(metrics, cases, at.merged)),
        licence=licence,
        tool=tool,
        publish=params.publish,
    )
    parameters = public_parameters(params.model_dump(include=SECTIONS))
    repository = checkout.this_repository()
    statement = provenance_json(manifest, exports, parameters=parameters, tool=tool, repository=repository)
    bom = bom_json(
        manifest,
        manifest_sha256,
        exports,
        name=params.publish.repo_id or params.name,
        licence=licence.license,
        usage=usage,
        figures=performance_metrics(metrics, cases),
    )
    texts = {payload.CARD: card.encode(), PROVENANCE: statement.encode(), BOM: bom.encode()}
    texts |= {PLOT: block_plot(blocks)} if blocks else {}
    texts |= {copy_name(name): content for name, content in copies.items()}
    return texts, pictures | {name: (at.exported / name, record) for name, record in exports.items()}


def _exports(params: Recipe, at: Artifacts, manifest_sha256: str) -> dict[str, FileRecord]:
    if not params.export.formats:
        return {}
    record = records.from_json(records.Exports, paths.read_text(at.exports, "export"), str(at.exports))
    if record.manifest_sha256 != manifest_sha256:
        raise PublishRefused(f"{at.exports} is of another merge", rerun=Rerun("export"))
    return record.files


@dataclass(frozen=True, slots=True)
class Release:
    """The manifest, the card and the other files to publish, what was hashed for it, and what stays here.

    `absent` are names of the manifest's files, all but those of a recipe.
    """

    manifest: Manifest
    card: str
    beside: dict[str, payload.Addition]
    hashed: payload.Hashed
    absent: frozenset[str]

    @property
    def sizes(self) -> list[int]:
        """The sizes in bytes of the manifest's files that are sent."""
        return [file.size for name, file in self.manifest.files.items() if name not in self.absent]


def checked_release(params: Recipe, at: Artifacts) -> Release:
    """The release, if `verify` and `gate` passed for these very bytes.

    Before a sha256 is written down, the file is hashed that has it: of what is sent, and of base and LoRAs.

    Raises:
        BadSource, BadGolden: see `gate.decide`; or a file of the base is not on this machine.
        PublishRefused: `verify` or `gate` did not, the licence is not settled and the repository would be public, or a
            file is not what the manifest says.
    """
    manifest, manifest_sha256 = read_manifest(at.manifest)
    decision = gate.decide(params, at)
    if decision.code:
        raise PublishRefused(f"the gate is not passed: {decision.reason}", rerun=decision.then)
    licence = resolve_licence(manifest, params.publish.license)
    if licence.problem and not params.publish.private:
        raise PublishRefused(licence.problem)
    tool = read_build(at.manifest, manifest_sha256).tool
    exports = _exports(params, at, manifest_sha256)
    hashed = hash_named(at, manifest, exports)
    texts, additions = contents_of(params, at, manifest, manifest_sha256, decision.metrics, licence, tool)
    release = named(manifest, params.publish.repo_id, params.publish.tag, tool)
    absent = left_out(manifest, exports) if params.publish.weights == RECIPE else frozenset()
    beside = write_release(at.release, at.merged, release, texts, additions, params.publish.signing.signer, absent)
    card = beside.pop(payload.CARD)[0].read_text(encoding="utf-8")
    return Release(manifest, card, beside, hashed, absent & manifest.files.keys())
