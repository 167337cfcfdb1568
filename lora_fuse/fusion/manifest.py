"""The manifest: what a merged checkpoint was made of and every byte that it consists of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.errors import BadSource, Rerun
from lora_fuse.fusion.plan import Plan
from lora_fuse.machine import files
from lora_fuse.recipe import Lock, Manifest, records

if TYPE_CHECKING:  # parameters are models of pydantic, and a plain fuse has none
    from lora_fuse.recipe import Recipe


def manifest_path(merged: Path) -> Path:
    """The path of a merge's manifest: beside it, so that `merged` holds only what is published."""
    return merged.with_name(f"{merged.name}.manifest.json")


def build_manifest(
    plan: Plan,
    written: dict[str, records.MergedFile],
    *,
    recipe: Recipe | None = None,
    base: Lock | None = None,
    loras: Mapping[str, Lock] | None = None,
) -> Manifest:
    """Build the manifest of a merge that was just written, as far as it was pinned with its locks.

    Name and scale are the recipe's; without one, the scale is that of the first LoRA.
    """
    merged = []
    by_component = {part.component: len(part.targets) for part in plan.parts}
    for number, (given, lora) in enumerate(zip(plan.inputs, plan.loras, strict=True)):
        lock = (loras or {}).get(given.name)
        name = files.as_text(given.name)
        entry = records.MergedLora(
            name, given.scale, lora.sha256, config_sha256=lora.config_sha256, left_out=lora.left_out
        )
        if plan.is_of_other_components:
            entry = replace(entry, components=tuple(plan.components_of(number)))
        if lock:
            entry = replace(entry, filename=lock.lora_name, repo_id=lock.repo_id, path=lock.path)
            entry = replace(entry, revision=lock.revision, license=lock.license)
        merged.append(entry)
    return Manifest(
        schema=records.SCHEMA,
        recipe=recipe.name if recipe else None,
        base=base,
        loras=tuple(merged),
        scale=recipe.fuse.scale if recipe else plan.inputs[0].scale,
        selection=None if plan.selection.everything else plan.selection,
        targets=sum(by_component.values()),
        files=written,
        source=_source(plan) or None,
        dtype=next((part.dtype for part in plan.parts if part.dtype is not None), None),
        components=by_component if plan.is_of_other_components else None,
    )


def _source(plan: Plan) -> dict[str, int]:
    """The formats of weights that are codes, with their number over all components."""
    words: Counter[str] = Counter()
    for part in plan.parts:
        words.update(part.source)
    return dict(sorted(words.items()))


def build_path(manifest: Path) -> Path:
    """The path of a build's record: beside the manifest of what it wrote."""
    return manifest.with_name(manifest.name.replace(".manifest.", ".build."))


def read_build(manifest: Path, manifest_sha256: str) -> records.BuildRecord:
    """Read the record of the build that wrote a manifest's files.

    Raises:
        BadSource: there is none, or it is of another merge.
    """
    path = build_path(manifest)
    again = Rerun("fuse", force=True)
    if not path.exists():
        raise BadSource(f"{path} is not there, so nothing says who built this", rerun=again)
    build = records.read(records.BuildRecord, path)
    if build.manifest_sha256 != manifest_sha256:
        raise BadSource(f"{path} is of another merge than {manifest}", rerun=again)
    return build


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Read a manifest and the sha256 of its text, which stands for these very bytes in later checks.

    Raises:
        BadSource: there is none, or it is not a manifest.
    """
    try:
        text = records.read_text(path)
    except FileNotFoundError as error:
        raise BadSource(f"{path} is not there", rerun=Rerun("fuse")) from error
    return records.from_json(Manifest, text, str(path)), hashlib.sha256(text.encode()).hexdigest()
