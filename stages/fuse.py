"""Stage `fuse`: stream base and LoRAs into a complete diffusers repository, and write its manifest."""

from __future__ import annotations

from lora_fuse.devices import fuse_device
from lora_fuse.export import diffusers_files
from lora_fuse.families import pair_warnings
from lora_fuse.manifest import build_manifest, write_manifest
from lora_fuse.progress import byte_progress
from stages.artifacts import HERE, Artifacts
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params
from stages.planning import plan_of


def fuse(params: Params, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write `merged/` and `merged.manifest.json`."""
    from lora_fuse.merge import bytes_to_write, write_merged

    base, loras = at.read_locks()
    for warning in pair_warnings(base.repo_id, [(lora.repo_id, lora.lora_name) for lora in loras.values()]):
        console.warn(warning)
    plan = plan_of(base, loras, params)
    generated = diffusers_files(plan.checkpoint.root, pipeline=params.base.pipeline, scheduler=params.scheduler_config)
    device = fuse_device(params.fuse.device, plan.plain)
    with byte_progress(f"fuse ({device})", bytes_to_write(plan)) as progress:
        files = write_merged(
            plan,
            at.merged,
            device=device,
            generated=generated,
            known=base.files,
            progress=progress,
            untouched=params.fuse.untouched,
        )
    manifest = build_manifest(plan, files, recipe=params.name, scale=params.fuse.scale, base=base, loras=loras)
    write_manifest(at.manifest, manifest)
    counts = {"targets": len(plan.targets), "tensors": len(plan.checkpoint.tensors()), "files": len(files)}
    line = f"{len(plan.targets)} of {counts['tensors']} tensors changed, {len(files)} files in {at.merged}"
    console.done("fuse", line, facts=counts)
    return 0


if __name__ == "__main__":
    run_stage(fuse)
