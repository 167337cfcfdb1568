"""Stage `export`: the merged checkpoint in the other formats that `export.formats` asks for, if any."""

from __future__ import annotations

from lora_fuse.checkpoint.shards import PROVENANCE, open_checkpoint
from lora_fuse.exports.formats import export, export_size
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.machine.console import PLAIN, Console
from lora_fuse.machine.files import replace_text
from lora_fuse.machine.progress import Stopwatch, byte_progress, estimate, human_bytes, human_rate
from lora_fuse.models.families import COMPONENT
from lora_fuse.recipe.paths import HERE, Artifacts
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import SCHEMA, Exports, to_json
from stages.run import run_stage


def export_formats(params: Recipe, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write `export/` and `export.json`."""
    manifest, manifest_sha256 = read_manifest(at.manifest)
    checkpoint = open_checkpoint(at.merged, COMPONENT, manifest.files)
    stated = [shard.header.metadata[PROVENANCE] for shard in checkpoint.shards if PROVENANCE in shard.header.metadata]
    metadata = {PROVENANCE: stated[0] if stated else "", f"{PROVENANCE}.manifest_sha256": manifest_sha256}
    formats, clock = params.export.formats, Stopwatch()
    size = export_size(checkpoint, formats, metadata)
    if formats:
        what = f"{', '.join(formats)}: {human_bytes(size)} to write to {at.exported}"
        console.will("export", f"{what}{estimate('export', size)}")
    with byte_progress("export", size, at_least=1) as progress:
        files = export(checkpoint, at.exported, formats, name=params.name, metadata=metadata, progress=progress)
    replace_text(at.exports, to_json(Exports(SCHEMA, manifest_sha256, files)))
    sums = [f"{record.sha256}  {name}\n" for name, record in files.items()]
    replace_text(at.exported / "SHA256SUMS", "".join(sums))  # for sha256sum -c; and DVC warns of an empty folder
    lines = [f"{name}, {human_bytes(record.size)}, sha256 {record.sha256}" for name, record in files.items()]
    lines += [f"{human_rate(size, clock.seconds)} written"] if files else []
    listed = {name: record.sha256 for name, record in files.items()}
    facts = {"files": listed, "seconds": clock.seconds}
    console.done("export", *(lines or ["export.formats is empty, nothing to do"]), facts=facts, then="dvc repro gate")
    return 0


if __name__ == "__main__":
    run_stage(export_formats)
