"""One fuse from its plan to its manifest: the device is resolved and the bytes are counted before anything is written.

The command line, the stage and `lora_fuse.fuse` all go through here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import diffusers_files, repository_files
from lora_fuse.errors import BadConfig
from lora_fuse.fusion.decoded.decoded_layout import decoded_texts
from lora_fuse.fusion.decoded.requantiser import Costs
from lora_fuse.fusion.decoded.side_channel import side_channel
from lora_fuse.fusion.destination import Destination
from lora_fuse.fusion.device import fuse_device
from lora_fuse.fusion.manifest import build_manifest, manifest_path
from lora_fuse.fusion.merge import bytes_to_copy, bytes_to_write, write_merged
from lora_fuse.fusion.plan import Plan
from lora_fuse.fusion.taking_over import ways_of
from lora_fuse.fusion.undone.undone_sums import UndoneSums
from lora_fuse.machine import file_state, files, progress
from lora_fuse.models import pipeline_call
from lora_fuse.recipe import Lock, Manifest, checkout, records

if TYPE_CHECKING:  # parameters are models of pydantic, and a plain fuse has none
    from lora_fuse.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Fused:
    """A merge that was written: its manifest, the bytes that this took to write, and the seconds.

    `linked` are the files that are the base's own under a second name (POSIX paths): who edits one edits both.
    """

    manifest: Manifest
    bytes_written: int
    seconds: float
    linked: tuple[str, ...] = ()

    @property
    def sharing(self) -> str | None:
        """The sentence about `linked` that whoever edits the merge has to know; None without such files."""
        if not self.linked:
            return None
        size = progress.human_bytes(sum(self.manifest.files[name].size for name in self.linked))
        return (
            f"unchanged weights ({size} in {len(self.linked)} files) are hard links to the base's, so do not edit them "
            "in place: --untouched copy (fuse.untouched) makes the merge independent"
        )


class FuseJob:
    """A merge to write, see `write_merged`; its manifest is written beside `out`."""

    def __init__(  # noqa: PLR0913 - by keyword, each is a choice of its own
        self,
        plan: Plan,
        out: Path,
        *,
        device: str = "auto",
        untouched: files.Untouched = "auto",
        pipeline: str | None = None,
        scheduler: Mapping[str, object] | None = None,
        replace: bool = False,
        force_quantised: bool = False,
        beside: bool = False,
        also: Mapping[str, bytes] | None = None,
    ) -> None:
        """Choose the device, generate the files and look at `out`.

        `pipeline` and `scheduler` are those of `diffusers_files`, `replace` is that of `Destination`; with
        `force_quantised` no result is refused for what it cost to quantise it again. With `beside` nothing is added to
        the base: `out` is a folder with it and the LoRAs, see `side_channel`. `also` are further files of a pipeline,
        by POSIX path.

        Raises:
            Refused: `out` may not be replaced, see `Destination.check`.
            NoDevice: the device asked for is not on this machine.
            BadConfig: a scheduler is given for a base that has none, or is of an unknown class.
            BadCheckpoint: the base's own configuration cannot be read.
        """
        base = plan.checkpoint
        if scheduler and base.kind != "pipeline":
            raise BadConfig(f"--scheduler is for a pipeline, and {base.root} is a {base.kind}; leave it out")
        self.plan = plan
        self.out = out
        self.device = "cpu" if plan.undo else fuse_device(device, plan.plain)
        self.untouched = untouched
        self.costs: Costs | UndoneSums = Costs(least=-1.0) if force_quantised else Costs()
        if plan.undo:
            self.costs = UndoneSums(plan.undo)
        self.generated: dict[str, bytes] = {}
        if pipeline or scheduler:
            self.generated = diffusers_files(base.root, pipeline=pipeline, scheduler=scheduler or {})
            kind = (scheduler or {}).get("_class_name")
            if repository_files.MODEL_INDEX in self.generated and kind not in (None, *pipeline_call.SCHEDULERS):
                known = ", ".join(pipeline_call.SCHEDULERS)
                raise BadConfig(f"--scheduler names the class {kind!r}, which is not the base's; known are {known}")
        self.generated |= also or {}
        self._written = plan
        if beside:
            self.generated |= side_channel(plan)
            self._written = dataclasses.replace(plan, targets={}, stored=None, requantise=False)
        for part in () if beside else plan.parts:
            if part.is_laid_out_anew:
                self.generated |= decoded_texts(part)
        self._destination = Destination.at(out, replace=replace, folder=beside)
        self._destination.check(plan, self.generated)
        self._ways = ways_of(self._written, self._destination.place, untouched)

    @property
    def label(self) -> str:
        """The work's name in progress lines; rates are remembered by it."""
        return "unmerge" if self.plan.undo else f"fuse ({self.device})"

    @property
    def nbytes(self) -> int:
        """Bytes to write: the fused shards, and what cannot be shared with the base."""
        return bytes_to_write(self._written) + sum(bytes_to_copy(self._written, self._ways).values())

    def run(
        self,
        recipe: Recipe | None = None,
        base: Lock | None = None,
        loras: Mapping[str, Lock] | None = None,
        states: file_state.FileStates | None = None,
        approve: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ) -> Fused:
        """Write the merge and its manifest, and show progress; the locks say where base and LoRAs came from.

        `states` are those in which the base's files were what the lock says, see `write_merged`; without them its
        files are hashed. `approve` is given the manifest when all is written and nothing is in its place; it returns
        the one to keep, or raises, and `out` stays as it was.

        Raises:
            NoSpace, Busy, Refused: see `write_merged`.
        """
        clock = progress.Stopwatch()
        nbytes = self.nbytes
        written: list[Fused] = []
        base = base or self.plan.lock

        def beside(merged: Mapping[str, records.MergedFile]) -> dict[Path, str]:
            manifest = build_manifest(self.plan, dict(merged), recipe=recipe, base=base, loras=loras)
            if isinstance(self.costs, UndoneSums):
                manifest = dataclasses.replace(manifest, unmerged=self.costs.total)
            elif self._written.requantise:
                manifest = dataclasses.replace(manifest, requantised=self.costs.total)
            manifest = approve(manifest)
            written.append(Fused(manifest, nbytes, clock.seconds))
            return self._records(written[0])

        with progress.byte_progress(self.label, nbytes) as advance:
            write_merged(
                self._written,
                self.out,
                device=self.device,
                generated=self.generated,
                known=base.files if base and states else {},
                progress=advance,
                untouched=self.untouched,
                replace=self._destination.replace,
                beside=beside,
                states=states,
                hash_inputs=recipe is not None and recipe.fuse.inputs == "hash",
                costs=self.costs,
                folder=self._destination.folder,
            )
        return dataclasses.replace(written[0], linked=tuple(self._linked()))

    def _linked(self) -> Iterator[str]:
        """The files that are the base's in the end: what was meant to be linked may have become a copy."""
        for name, way in self._ways.items():
            merged = self._destination.place / name
            if way == "hardlink" and merged.is_file() and merged.samefile(self.plan.checkpoint.locate(name)):
                yield name

    def _records(self, fused: Fused) -> dict[Path, str]:
        """The manifest and the record of this build, by their paths."""
        manifest = records.to_json(fused.manifest)
        build = records.BuildRecord(
            schema=records.SCHEMA,
            manifest_sha256=hashlib.sha256(manifest.encode()).hexdigest(),
            tool=checkout.this_tool(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            device=self.device,
            bytes_written=fused.bytes_written,
            seconds=round(fused.seconds, 3),
        )
        return {manifest_path(self._destination.out): manifest, self._destination.build: records.to_json(build)}
