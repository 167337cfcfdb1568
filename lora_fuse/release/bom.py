"""Bill of materials of a merge in CycloneDX 1.6: the model, the base and LoRAs that it was made of, their files.

Format: cyclonedx.org/docs/1.6/json, a machine-learning BOM (cyclonedx.org/capabilities/mlbom). The library
(cyclonedx-python-lib) writes and orders it; it has no class for a model card yet, so `modelCard` is put into its JSON,
and a test holds the whole against the schema.

Invariant: the same merge gives the same text. The serial number is made from the manifest's sha256, and no time is
written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.spdx import fixup_id

from lora_fuse.machine import FileRecord
from lora_fuse.recipe import License, Lock, Manifest, records
from lora_fuse.release.card import Usage
from lora_fuse.release.slsa import purl


def bom_json(
    manifest: Manifest,
    manifest_sha256: str,
    exports: Mapping[str, FileRecord],
    *,
    name: str,
    licence: License,
    usage: Usage,
    figures: Sequence[Mapping[str, str]],
) -> str:
    """The content of `bom.cdx.json`; `figures` are its regression's, as CycloneDX' `performanceMetrics`."""
    files: Mapping[str, FileRecord | records.MergedFile] = {**manifest.files, **exports}
    ancestors = [_base(manifest.base)] if manifest.base else []
    ancestors += [_lora(number, lora) for number, lora in enumerate(manifest.loras, start=1)]
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"urn:lora-fuse:manifest:{manifest_sha256}"))
    bom.metadata.component = Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        version=manifest_sha256[:12],
        licenses=_licences(licence),
        components=[_file(path, file.sha256, "model") for path, file in files.items()],
        pedigree=Pedigree(ancestors=ancestors, notes=_notes(manifest)),
    )
    content = json.loads(JsonV1Dot6(bom).output_as_string())
    del content["metadata"]["timestamp"]
    content["metadata"]["component"]["modelCard"] = _model_card(usage, figures)
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _file(path: str, sha256: str, owner: str) -> Component:
    return Component(name=path, type=ComponentType.FILE, bom_ref=f"{owner}/{path}", hashes=_hashes(sha256))


def _hashes(sha256: str) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _base(base: Lock) -> Component:
    return Component(
        name=base.repo_id or "base",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="base",
        version=base.revision,
        purl=purl(base.repo_id, base.revision) if base.repo_id else None,
        licenses=_licences(base.license),
        components=[_file(path, file.sha256, "base") for path, file in base.files.items()],
    )


def _lora(number: int, lora: records.MergedLora) -> Component:
    file = lora.filename or f"{lora.name}.safetensors"
    return Component(
        name=f"{lora.repo_id}/{file}" if lora.repo_id else file,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"lora-{number}",
        version=lora.revision,
        purl=purl(lora.repo_id, lora.revision, file) if lora.repo_id else None,
        licenses=_licences(lora.license),
        hashes=_hashes(lora.sha256),
        properties=[Property(name="lora-fuse:scale", value=repr(lora.scale))],
    )


def _licences(stated: License | None) -> list[DisjunctiveLicense]:
    """The licence by its SPDX id, which the Hub writes in lower case, or by its name where SPDX has none."""
    if stated is None:
        return []
    url = XsUri(stated.link) if stated.link else None
    spdx = fixup_id(stated.id)
    return [DisjunctiveLicense(id=spdx, url=url) if spdx else DisjunctiveLicense(name=stated.label, url=url)]


def _notes(manifest: Manifest) -> str:
    scales = ", ".join(f"{lora.name} at {lora.scale:g}" for lora in manifest.loras)
    return f"The LoRAs ({scales}) are added to {manifest.targets} weights of the base, each sum rounded once."


def _model_card(usage: Usage, figures: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    inputs = ["text", "image"] if usage.edits else ["text"]
    settings = f"Run with exactly {usage.steps} steps at {usage.guidance} and its own scheduler."
    return {
        "modelParameters": {
            "task": usage.task,
            "architectureFamily": "diffusion transformer",
            "modelArchitecture": usage.pipeline,
            "inputs": [{"format": name} for name in inputs],
            "outputs": [{"format": usage.makes}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(figures)},
        "considerations": {"technicalLimitations": [settings]},
    }
