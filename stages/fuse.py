"""Stage `fuse`: stream base and LoRAs into a complete diffusers repository, and write its manifest."""

from __future__ import annotations

from lora_fuse.checkpoint import diffusers_files
from lora_fuse.fusion import device, manifest, plan_of
from lora_fuse.machine import PLAIN, Console, progress
from lora_fuse.models import pair_warnings
from lora_fuse.recipe import Artifacts, Recipe, paths
from stages.run import run_stage

KEPT = "shards that are finished are kept, artifacts/merged is as it was; `dvc repro` goes on with the next shard"


def fuse(params: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `merged/` and `merged.manifest.json`."""
    from lora_fuse.fusion import merge

    base, loras = at.read_locks()
    for warning in pair_warnings(base.repo_id, [(lora.repo_id, lora.lora_name) for lora in loras.values()]):
        console.warn(warning)
    plan, untouched = plan_of(base, loras, params), params.fuse.untouched
    generated = diffusers_files(plan.checkpoint.root, pipeline=params.base.pipeline, scheduler=params.scheduler_config)
    chosen, tensors = device.fuse_device(params.fuse.device, plan.plain), len(plan.checkpoint.tensors())
    work, size = f"fuse ({chosen})", merge.bytes_to_write(plan) + merge.bytes_to_copy(plan, at.merged, untouched)
    shards = f"{len(plan.fused_shards)} of {len(plan.checkpoint.shards)} weight files"
    console.will(
        "fuse",
        f"{shards}, {progress.human_bytes(size)} to write to {at.merged} on {chosen}{progress.estimate(work, size)}",
    )
    clock = progress.Stopwatch()
    with progress.byte_progress(work, size) as advance:
        files = merge.write_merged(
            plan,
            at.merged,
            device=chosen,
            generated=generated,
            known=base.files,
            progress=advance,
            untouched=untouched,
        )
    made = manifest.build_manifest(plan, files, recipe=params.name, scale=params.fuse.scale, base=base, loras=loras)
    manifest.write_manifest(at.manifest, made)
    line = f"{len(plan.targets)} of {tensors} tensors changed, {len(files)} files in {at.merged}"
    counts = {"targets": len(plan.targets), "tensors": tensors, "files": len(files), "bytes_written": size}
    facts = {**counts, "seconds": clock.seconds}
    console.done(
        "fuse", line, f"{progress.human_rate(size, clock.seconds)} written", facts=facts, then="dvc repro verify"
    )
    return 0


if __name__ == "__main__":
    run_stage(fuse, kept=KEPT)
