"""Stage `export`: the merged checkpoint in the other formats that `export.formats` asks for, if any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lora_fuse.checkpoint import PROVENANCE, open_checkpoint
from lora_fuse.errors import BadCheckpoint, Rerun
from lora_fuse.exports import ExportOptions, export, export_size, needs_sums
from lora_fuse.fusion import exact_sums, plan_of, read_manifest
from lora_fuse.machine import Console, files, progress
from lora_fuse.models import COMPONENT
from lora_fuse.recipe import Artifacts, Recipe, paths, records
from stages.run import PLAIN, run_stage


def export_formats(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `export/` and `export.json`."""
    manifest, manifest_sha256 = read_manifest(at.manifest)
    checkpoint = open_checkpoint(at.merged, COMPONENT, manifest.files)
    stated = [shard.header.metadata[PROVENANCE] for shard in checkpoint.shards if PROVENANCE in shard.header.metadata]
    made_of = stated[0] if stated else ""
    metadata = {PROVENANCE: made_of, f"{PROVENANCE}.manifest_sha256": manifest_sha256}
    formats = recipe.export.formats
    clock = progress.Stopwatch()
    size = export_size(checkpoint, formats, metadata, ExportOptions.of(recipe.export))
    if formats:
        to_write = f"{', '.join(formats)}: {progress.human_bytes(size)} to write to {at.exported}"
        console.will("export", f"{to_write}{progress.estimate('export', size)}")
    with exact(recipe, at, made_of) as exact_options, progress.byte_progress("export", size, at_least=1) as advance:
        exported = export(
            checkpoint,
            at.exported,
            formats,
            name=recipe.name,
            metadata=metadata,
            progress=advance,
            options=exact_options,
        )
    files.replace_text(at.exports, records.to_json(records.Exports(records.SCHEMA, manifest_sha256, exported)))
    lines = [
        f"{name}, {progress.human_bytes(record.size)}, sha256 {record.sha256}" for name, record in exported.items()
    ]
    lines += [f"{progress.human_rate(size, clock.seconds)} written"] if exported else []
    listed = {name: record.sha256 for name, record in exported.items()}
    facts = {"files": listed, "seconds": clock.seconds}
    console.done("export", *(lines or ["export.formats is empty, nothing to do"]), facts=facts, then="dvc repro gate")
    return 0


@contextmanager
def exact(recipe: Recipe, at: Artifacts, made_of: str) -> Iterator[ExportOptions]:
    """Hold base and LoRAs while a quantised export is made of their exact sums, which the settings have then.

    Raises:
        BadCheckpoint: the merge is of other LoRAs, or of others' scales.
    """
    if not needs_sums(recipe.export.formats):
        yield ExportOptions.of(recipe.export)
        return
    base, loras = at.read_locks()
    with paths.held([base, *loras.values()]):
        plan = plan_of(base, loras, recipe)
        if plan.provenance != made_of:
            raise BadCheckpoint(
                f"{at.merged} is of {made_of or 'nothing that it says'}, and the locks and the recipe are of "
                f"{plan.provenance}",
                rerun=Rerun("fuse", force=True),
            )
        yield replace(ExportOptions.of(recipe.export), matrix=exact_sums(plan).matrix)


if __name__ == "__main__":
    run_stage(export_formats)
