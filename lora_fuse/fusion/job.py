"""One fuse from its plan to its manifest: the device is resolved and the bytes are counted before anything is written.

The command line, the stage and `lora_fuse.fuse` all go through here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import diffusers_files
from lora_fuse.errors import BadConfig
from lora_fuse.fusion.device import fuse_device
from lora_fuse.fusion.manifest import build_manifest, build_path, manifest_path, write_manifest
from lora_fuse.fusion.merge import bytes_to_copy, bytes_to_write, write_merged
from lora_fuse.fusion.plan import Plan
from lora_fuse.machine import files, progress
from lora_fuse.recipe import Lock, Manifest, checkout, records

if TYPE_CHECKING:  # parameters are models of pydantic, and a plain fuse has none
    from lora_fuse.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Fused:
    """A merge that was written: its manifest, the bytes that this took to write, and the seconds."""

    manifest: Manifest
    bytes_written: int
    seconds: float


class FuseJob:
    """A merge to write, see `write_merged`; its manifest is written beside `out`."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        device: str = "auto",
        untouched: files.Untouched = "auto",
        pipeline: str | None = None,
        scheduler: Mapping[str, object] | None = None,
    ) -> None:
        """Choose the device and generate the files; `pipeline` and `scheduler` are those of `diffusers_files`.

        Raises:
            NoDevice: the device asked for is not on this machine.
            BadConfig: a scheduler is given for a base that has none.
            BadCheckpoint: the base's own configuration cannot be read.
        """
        base = plan.checkpoint
        if scheduler and base.kind != "pipeline":
            raise BadConfig(f"--scheduler is for a pipeline, and {base.root} is a {base.kind}; leave it out")
        self.plan = plan
        self.out = out
        self.device = fuse_device(device, plan.plain)
        self.untouched = untouched
        self.generated: dict[str, bytes] = {}
        if pipeline or scheduler:
            self.generated = diffusers_files(base.root, pipeline=pipeline, scheduler=scheduler or {})

    @property
    def label(self) -> str:
        """The work's name in progress lines; rates are remembered by it."""
        return f"fuse ({self.device})"

    @property
    def nbytes(self) -> int:
        """Bytes to write: the fused shards, and what cannot be shared with the base."""
        return bytes_to_write(self.plan) + sum(bytes_to_copy(self.plan, self.out, self.untouched).values())

    def run(
        self, recipe: Recipe | None = None, base: Lock | None = None, loras: Mapping[str, Lock] | None = None
    ) -> Fused:
        """Write the merge and its manifest, and show progress; the locks say where base and LoRAs came from.

        Raises:
            NoSpace, Busy, Refused: see `write_merged`.
        """
        clock = progress.Stopwatch()
        nbytes = self.nbytes
        with progress.byte_progress(self.label, nbytes) as advance:
            merged = write_merged(
                self.plan,
                self.out,
                device=self.device,
                generated=self.generated,
                known=base.files if base else {},
                progress=advance,
                untouched=self.untouched,
            )
        manifest = build_manifest(self.plan, merged, recipe=recipe, base=base, loras=loras)
        manifest_sha256 = write_manifest(manifest_path(self.out), manifest)
        fused = Fused(manifest, nbytes, clock.seconds)
        build = records.BuildRecord(
            schema=records.SCHEMA,
            manifest_sha256=manifest_sha256,
            tool=checkout.this_tool(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            device=self.device,
            bytes_written=fused.bytes_written,
            seconds=round(fused.seconds, 3),
        )
        files.replace_text(build_path(manifest_path(self.out)), records.to_json(build))
        return fused
