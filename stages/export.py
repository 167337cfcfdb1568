"""Stage `export`: the merged checkpoint in the other formats that `export.formats` asks for, if any."""

from __future__ import annotations

from contextlib import nullcontext

from lora_fuse.checkpoint import PROVENANCE, open_checkpoint
from lora_fuse.exporting import export, export_size
from lora_fuse.families import COMPONENT
from lora_fuse.files import replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.progress import byte_progress, human_bytes
from lora_fuse.records import SCHEMA, Exports, to_json
from stages.artifacts import EXPORTED, EXPORTS, MANIFEST, MERGED
from stages.config import run_stage
from stages.params import Params


def export_formats(params: Params) -> int:
    """Write `export/` and `export.json`."""
    manifest, manifest_sha256 = read_manifest(MANIFEST)
    checkpoint = open_checkpoint(MERGED, COMPONENT, manifest.files)
    stated = [shard.header.metadata[PROVENANCE] for shard in checkpoint.shards if PROVENANCE in shard.header.metadata]
    metadata = {PROVENANCE: stated[0] if stated else "", f"{PROVENANCE}.manifest_sha256": manifest_sha256}
    formats = params.export.formats
    shown = (
        byte_progress("export", export_size(checkpoint, formats, metadata)) if formats else nullcontext(lambda _: None)
    )
    with shown as progress:
        files = export(checkpoint, EXPORTED, formats, name=params.name, metadata=metadata, progress=progress)
    replace_text(EXPORTS, to_json(Exports(SCHEMA, manifest_sha256, files)))
    for name, record in files.items():
        print(f"export: {name}, {human_bytes(record.size)}, sha256 {record.sha256}")
    if not files:
        print("export: export.formats is empty, nothing to do")
    return 0


if __name__ == "__main__":
    run_stage(export_formats)
