"""Stage `fuse`: stream base and LoRAs into a complete diffusers repository, and write its manifest."""

from __future__ import annotations

from lora_fuse.checkpoint.diffusers_layout import diffusers_files
from lora_fuse.fusion.device import fuse_device
from lora_fuse.fusion.manifest import build_manifest, write_manifest
from lora_fuse.fusion.plan import plan_of
from lora_fuse.machine.console import PLAIN, Console
from lora_fuse.machine.progress import Stopwatch, byte_progress, estimate, human_bytes, human_rate
from lora_fuse.models.families import pair_warnings
from lora_fuse.recipe.paths import HERE, Artifacts
from lora_fuse.recipe.recipe import Recipe
from stages.run import run_stage

KEPT = "shards that are finished are kept, artifacts/merged is as it was; `dvc repro` goes on with the next shard"


def fuse(params: Recipe, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write `merged/` and `merged.manifest.json`."""
    from lora_fuse.fusion.merge import bytes_to_copy, bytes_to_write, write_merged

    base, loras = at.read_locks()
    for warning in pair_warnings(base.repo_id, [(lora.repo_id, lora.lora_name) for lora in loras.values()]):
        console.warn(warning)
    plan, untouched = plan_of(base, loras, params), params.fuse.untouched
    generated = diffusers_files(plan.checkpoint.root, pipeline=params.base.pipeline, scheduler=params.scheduler_config)
    device, tensors = fuse_device(params.fuse.device, plan.plain), len(plan.checkpoint.tensors())
    work, size = f"fuse ({device})", bytes_to_write(plan) + bytes_to_copy(plan, at.merged, untouched)
    shards = f"{len(plan.fused_shards)} of {len(plan.checkpoint.shards)} weight files"
    console.will("fuse", f"{shards}, {human_bytes(size)} to write to {at.merged} on {device}{estimate(work, size)}")
    clock = Stopwatch()
    with byte_progress(work, size) as progress:
        files = write_merged(
            plan,
            at.merged,
            device=device,
            generated=generated,
            known=base.files,
            progress=progress,
            untouched=untouched,
        )
    manifest = build_manifest(plan, files, recipe=params.name, scale=params.fuse.scale, base=base, loras=loras)
    write_manifest(at.manifest, manifest)
    line = f"{len(plan.targets)} of {tensors} tensors changed, {len(files)} files in {at.merged}"
    counts = {"targets": len(plan.targets), "tensors": tensors, "files": len(files), "bytes_written": size}
    facts = {**counts, "seconds": clock.seconds}
    console.done("fuse", line, f"{human_rate(size, clock.seconds)} written", facts=facts, then="dvc repro verify")
    return 0


if __name__ == "__main__":
    run_stage(fuse, kept=KEPT)
