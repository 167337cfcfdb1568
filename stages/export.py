"""Stage `export`: the merged checkpoint in the other formats that `export.formats` asks for, if any.

With ``--search BYTES`` nothing is written: it finds the layers to keep for the least error in a file of that size, and
prints the line for the recipe.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from lora_fuse.checkpoint import PROVENANCE, open_checkpoint
from lora_fuse.errors import BadCheckpoint, BadConfig, Rerun
from lora_fuse.exports import ExportOptions, export, export_size, needs_sums
from lora_fuse.fusion import exact_sums, plan_of, read_manifest
from lora_fuse.machine import Console, files, progress
from lora_fuse.pictures import environment, pairs
from lora_fuse.recipe import Artifacts, Recipe, paths, records
from lora_fuse.studies import keep_search
from stages.run import PLAIN, run_stage


def export_formats(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `export/` and `export.json`."""
    manifest, manifest_sha256 = read_manifest(at.manifest)
    checkpoint = open_checkpoint(at.merged, files=manifest.files)
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
    base, loras = at.locks_of(recipe)
    with paths.held([base, *loras.values()]):
        plan = plan_of(base, loras, recipe)
        if plan.provenance != made_of:
            raise BadCheckpoint(
                f"{at.merged} is of {made_of or 'nothing that it says'}, and the locks and the recipe are of "
                f"{plan.provenance}",
                rerun=Rerun("fuse", force=True),
            )
        yield replace(ExportOptions.of(recipe.export), matrix=exact_sums(plan).matrix)


def search(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN, *, size: str) -> int:
    """Print `export.keep` for the one format of the recipe, found for a file of at most so many bytes, ``13.5GB``."""
    room = bytes_of(size)
    base, loras = at.locks_of(recipe)
    setup = pairs.Setup.of(recipe, baseline=False)
    environment.make_deterministic(recipe.regress.threads)
    clock = progress.Stopwatch()
    with paths.held([base, *loras.values()]):
        found = keep_search.search_keep(recipe, at, plan_of(base, loras, recipe), setup, room)
    took = f"in {progress.human_seconds(clock.seconds)}"
    facts = {"keep": list(found.keep), "bytes": found.size, "before": found.before, "after": found.after}
    console.done("export", f"{found}, {took}", f"for the recipe, below export: {found.line}", facts=facts)
    return 0


def bytes_of(size: str) -> int:
    """A number of bytes from a text, ``13500000000`` or ``13.5GB``.

    Raises:
        BadConfig: it is none.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)(B|kB|MB|GB)?", size)
    if not found:
        raise BadConfig(f"--search takes a size, and got {size!r}: python -m stages.export --search 13.5GB")
    return int(float(found[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}.get(found[2], 1))


def take_search(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and the size of ``--search SIZE``; None without, empty where it is missing."""
    for at, argument in enumerate(arguments):
        name, equals, size = argument.partition("=")
        if name == "--search":
            rest = arguments[at + 1 :] if equals else arguments[at + 2 :]
            return [*arguments[:at], *rest], size if equals else "".join(arguments[at + 1 : at + 2])
    return list(arguments), None


if __name__ == "__main__":
    sys.argv[1:], asked = take_search(sys.argv[1:])
    run_stage(export_formats if asked is None else partial(search, size=asked), writes=asked is None)
