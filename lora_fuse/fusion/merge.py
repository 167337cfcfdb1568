"""A merged checkpoint, whole or not at all: everything is written beside `out` and then takes its place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from threadpoolctl import threadpool_limits

from lora_fuse.checkpoint import PROVENANCE, Shard
from lora_fuse.errors import BadCheckpoint, Refused
from lora_fuse.fusion.destination import Destination
from lora_fuse.fusion.plan import Plan
from lora_fuse.fusion.stream import FuseOptions, Progress, Stopped, fuse_shard, refuse_other_content
from lora_fuse.fusion.taking_over import Ways, take_over, ways_of
from lora_fuse.machine import FileRecord, direct_io, file_state, files, space, staging
from lora_fuse.recipe import records

ENGINE = 1  # to be raised when the same inputs give other bytes
Beside = Callable[[Mapping[str, records.MergedFile]], Mapping[Path, str]]


def write_merged(  # noqa: PLR0913 - by keyword, each is a choice of its own
    plan: Plan,
    out: Path,
    *,
    device: str,
    generated: Mapping[str, bytes],
    known: Mapping[str, FileRecord],
    progress: Progress,
    untouched: files.Untouched = "auto",
    replace: bool = False,
    beside: Beside = lambda _: {},
    states: file_state.FileStates | None = None,
    hash_inputs: bool = False,
) -> dict[str, records.MergedFile]:
    """Write the merged checkpoint of the same kind as the base to `out`, replacing what was there.

    The bytes do not depend on the device. `generated` are files of a pipeline whose content is given here instead of
    the base's, by POSIX path; `known` are the base's files whose sha256 a lock has: they are not hashed again, or with
    `hash_inputs` all are, as they are read, and have to be those. `replace` is that of `Destination`; `beside` makes
    the texts that are put beside the result right after it, of its files. All inputs have to stay as they were when the
    plan was made, or as `states` has them from before: that is told of links to them that were made here.

    Returns:
        Every file of the result by POSIX path.

    Raises:
        NoSpace: the disk has less room than the result needs; nothing was written.
        Refused: `out` may not be replaced, see `Destination.check`; nothing was written.
        Busy: another process is writing the same result.
        Refused: the base or a LoRA turned out to be broken, or changed meanwhile; `out` is as it was.
    """
    destination = Destination.at(out, replace=replace)
    destination.check(plan, generated)
    place = destination.place
    ways = ways_of(plan, place, untouched)
    to_write = bytes_to_write(plan)
    need = to_write + sum(bytes_to_copy(plan, ways).values()) + space.SPARE
    space.require(files.nearest_folder(place), need, "the merged checkpoint", "make room, or write OUT on another disk")
    try:
        states = _watched(plan, states)
        pinned = {name: record.sha256 for name, record in known.items()} if hash_inputs else {}
        with staging.staging_folder(place, _key(plan, states, pinned)) as staged:
            way = FuseOptions(device, direct=direct_io.too_large_to_cache(to_write), pinned=pinned)
            written = _fuse_shards(plan, staged, way, states, progress)
            placed = _place_others(plan, staged, generated, ways, states, progress)
            written |= _hash_others(plan, placed, known, pinned, states) | _write_generated(staged, generated)
            _refuse_changed(states)
            destination.check(plan, generated)  # it took a while
            new = staged.files
            if plan.checkpoint.kind == "file":
                ((name, record),) = written.items()
                new = new / name
                written = {destination.out.name: record}
            merged = dict(sorted(written.items()))
            _replace(new, place, beside(merged), states)
    except OSError as error:
        raise Refused(f"cannot write {out}: {error.strerror} ({error.filename or out}); it is as it was") from error
    return merged


def _replace(new: Path, place: Path, beside: Mapping[Path, str], states: file_state.FileStates) -> None:
    """Put the new result and the texts beside it in their places, and remove the old one with its links to the base."""
    with files.prepared(beside) as put_beside:
        staging.replace_atomically(new, place)
        put_beside()
    with states.linking(), suppress(OSError):  # it may be another user's
        staging.remove(new)


def _watched(plan: Plan, states: file_state.FileStates | None) -> file_state.FileStates:
    """The states of all that is read: those that were given, and for other files those of the plan."""
    watched = states or file_state.FileStates()
    for path, state in plan.checkpoint.states.items():
        watched.add(path, state)
    for lora in plan.loras:
        watched.add(lora.path, lora.state, FileRecord(lora.state.size, lora.sha256))
    return watched


def _refuse_changed(states: file_state.FileStates, paths: Iterable[Path] | None = None) -> None:
    for path in states.changed(paths):
        if not path.exists():
            raise BadCheckpoint(f"{path} is not there any more; fetch it again")
        raise Refused(f"{path} changed while it was read; run again when nothing writes to it")


def _key(plan: Plan, states: file_state.FileStates, pinned: Mapping[str, str]) -> str:
    """A hash of all that the bytes of fused shards depend on; a base shard is known by its state, or also pinned."""
    shards = {shard.relative: [*astuple(states[shard.path]), pinned.get(shard.relative)] for shard in plan.fused_shards}
    return hashlib.sha256(json.dumps([ENGINE, plan.provenance, shards]).encode()).hexdigest()


def bytes_to_write(plan: Plan) -> int:
    """Bytes that go through the engine: the fused shards, whole."""
    entry = plan.provenance
    return sum(
        _stat(shard.path).st_size - len(shard.header.raw) + len(shard.header.with_metadata(PROVENANCE, entry))
        for shard in plan.fused_shards
    )


def bytes_to_copy(plan: Plan, ways: Ways) -> dict[str, int]:
    """Bytes of each file that stays and is not shared with the base, by its way (`ways_of`)."""
    return {name: _stat(plan.checkpoint.locate(name)).st_size for name, way in ways.items() if way == "copy"}


def _fuse_shards(
    plan: Plan, place: staging.StagingFolder, way: FuseOptions, states: file_state.FileStates, progress: Progress
) -> dict[str, records.MergedFile]:
    """Fuse the shards that change, several at a time; those that a killed run has finished are not made again."""
    done = place.keep_finished([shard.relative for shard in plan.fused_shards], progress)

    def fuse(shard: Shard) -> FileRecord:
        if shard.relative in done:
            return done[shard.relative]
        record = fuse_shard(shard, plan.targets, place.place(shard.relative), way, plan.provenance, progress)
        _refuse_changed(states, [shard.path])
        place.finish(shard.relative, record)
        return record

    # BLAS has one thread: its own would spin against those that take pieces.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(way.shards, "shard") as pool:
        running = [pool.submit(fuse, shard) for shard in plan.fused_shards]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:  # after a failure or Ctrl-C; otherwise nothing runs any more
            way.stop.set()
            cancelled = [shard for shard in running if shard.cancel()]
        finished = [shard for shard in running if shard not in cancelled]
        failed = [error for shard in finished if (error := shard.exception()) is not None]
        for error in sorted(failed, key=lambda error: isinstance(error, Stopped)):
            raise error
        hashed = [shard.result() for shard in running]
    return {
        shard.relative: records.MergedFile(record.size, record.sha256, "fused")
        for shard, record in zip(plan.fused_shards, hashed, strict=True)
    }


def _place_others(
    plan: Plan,
    place: staging.StagingFolder,
    generated: Mapping[str, bytes],
    ways: Ways,
    states: file_state.FileStates,
    progress: Progress,
) -> dict[str, Path]:
    """Place the base's unchanged files, one by one; one that is generated stays where it is."""
    paths = {}
    fused = {shard.relative for shard in plan.fused_shards}
    same = [shard.relative for shard in plan.checkpoint.shards if shard.relative not in fused]
    for name in [*same, *plan.checkpoint.others]:
        placed = source = plan.checkpoint.locate(name)
        if name not in generated:
            placed = place.place(name)
            take_over(source, placed, ways[name], states)
        paths[name] = placed
        if ways[name] == "copy":
            progress(_stat(source).st_size)
    return paths


def _hash_others(
    plan: Plan,
    placed: Mapping[str, Path],
    known: Mapping[str, FileRecord],
    pinned: Mapping[str, str],
    states: file_state.FileStates,
) -> dict[str, records.MergedFile]:
    """The base's unchanged files by POSIX path; hashed is what was placed, where it is not known."""
    unknown = [name for name in placed if name in pinned or name not in known]
    hashed = file_state.in_threads(
        lambda name, advance: files.hash_file(placed[name], advance),
        unknown,
        lambda _: None,
        lambda name: _stat(placed[name]).st_size,
    )
    found = dict(zip(unknown, hashed, strict=True))
    for name in placed:
        source = plan.checkpoint.locate(name)
        record = found.get(name) or known[name]
        refuse_other_content(source, record.sha256, pinned.get(name, record.sha256))
        states.add(source, states[source], record)
        found[name] = record
    return {name: records.MergedFile(record.size, record.sha256, "base") for name, record in found.items()}


def _write_generated(place: staging.StagingFolder, generated: Mapping[str, bytes]) -> dict[str, records.MergedFile]:
    for name, content in generated.items():
        place.place(name).write_bytes(content)
    return {
        name: records.MergedFile(len(content), hashlib.sha256(content).hexdigest(), "generated")
        for name, content in generated.items()
    }


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise BadCheckpoint(f"{path} is not there any more ({error.strerror}); fetch it again") from error
