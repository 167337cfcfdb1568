"""Stage `export`: the merged checkpoint in the other formats that `export.formats` asks for, if any."""

from __future__ import annotations

from lora_fuse.checkpoint import PROVENANCE, open_checkpoint
from lora_fuse.exports import export, export_size
from lora_fuse.fusion import read_manifest
from lora_fuse.machine import Console, files, progress
from lora_fuse.models import COMPONENT
from lora_fuse.recipe import Artifacts, Recipe, paths, records
from stages.run import PLAIN, run_stage


def export_formats(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `export/` and `export.json`."""
    manifest, manifest_sha256 = read_manifest(at.manifest)
    checkpoint = open_checkpoint(at.merged, COMPONENT, manifest.files)
    stated = [shard.header.metadata[PROVENANCE] for shard in checkpoint.shards if PROVENANCE in shard.header.metadata]
    metadata = {PROVENANCE: stated[0] if stated else "", f"{PROVENANCE}.manifest_sha256": manifest_sha256}
    formats = recipe.export.formats
    clock = progress.Stopwatch()
    size = export_size(checkpoint, formats, metadata)
    if formats:
        to_write = f"{', '.join(formats)}: {progress.human_bytes(size)} to write to {at.exported}"
        console.will("export", f"{to_write}{progress.estimate('export', size)}")
    with progress.byte_progress("export", size, at_least=1) as advance:
        exported = export(checkpoint, at.exported, formats, name=recipe.name, metadata=metadata, progress=advance)
    files.replace_text(at.exports, records.to_json(records.Exports(records.SCHEMA, manifest_sha256, exported)))
    lines = [
        f"{name}, {progress.human_bytes(record.size)}, sha256 {record.sha256}" for name, record in exported.items()
    ]
    lines += [f"{progress.human_rate(size, clock.seconds)} written"] if exported else []
    listed = {name: record.sha256 for name, record in exported.items()}
    facts = {"files": listed, "seconds": clock.seconds}
    console.done("export", *(lines or ["export.formats is empty, nothing to do"]), facts=facts, then="dvc repro gate")
    return 0


if __name__ == "__main__":
    run_stage(export_formats)
