"""Stage `fuse`: stream base and LoRAs into a complete diffusers repository, and write its manifest."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fuse.differences import presence_warnings
from lora_fuse.fusion import FuseJob, cautions, plan_of
from lora_fuse.hub import streamed_base
from lora_fuse.machine import Console, progress
from lora_fuse.recipe import Artifacts, Lock, Recipe, paths
from stages.run import PLAIN, run_stage

KEPT = "shards that are finished are kept, artifacts/merged is as it was; `dvc repro` goes on with the next shard"


def fuse(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `merged/` and `merged.manifest.json`."""
    base, loras = at.locks_of(recipe)
    with streamed_base.open_locked(base, recipe.download) as arriving:
        return _fuse(recipe, at, console, base, loras, arriving)


def _fuse(
    recipe: Recipe,
    at: Artifacts,
    console: Console,
    base: Lock,
    loras: Mapping[str, Lock],
    arriving: streamed_base.StreamedBase | None,
) -> int:
    if arriving is None:
        inputs = paths.hold([base, *loras.values()])
        plan = plan_of(base, loras, recipe)
    else:
        inputs = paths.hold(loras.values())
        plan = plan_of(base, loras, recipe, root=arriving.root, streamed=arriving.files)
    for warning in [*cautions(plan, recipe.scheduler_config), *presence_warnings(plan)]:
        console.warn(warning)
    job = FuseJob(
        plan,
        at.merged,
        device=recipe.fuse.device,
        untouched=recipe.fuse.untouched,
        pipeline=recipe.base.pipeline,
        scheduler=recipe.scheduler_config,
        replace=True,  # the place is the pipeline's own
    )
    nbytes = job.nbytes
    shards = f"{len(plan.fused_shards)} of {len(plan.shards)} weight files"
    to_write = f"{progress.human_bytes(nbytes)} to write to {at.merged} on {job.device}"
    console.will("fuse", f"{shards}, {to_write}{progress.estimate(job.label, nbytes)}")
    fused = job.run(recipe, base, loras, inputs.states)
    inputs.keep()
    counts = {
        "targets": fused.manifest.targets,
        "tensors": sum(len(part.checkpoint.tensors()) for part in plan.parts),
        "files": len(fused.manifest.files),
    }
    line = "{targets} of {tensors} tensors changed, {files} files in {merged}".format(**counts, merged=at.merged)
    facts = {**counts, "bytes_written": fused.bytes_written, "seconds": fused.seconds}
    written = f"{progress.human_rate(fused.bytes_written, fused.seconds)} written"
    console.done("fuse", line, written, *filter(None, [fused.sharing]), facts=facts, then="dvc repro verify")
    return 0


if __name__ == "__main__":
    run_stage(fuse, kept=KEPT)
