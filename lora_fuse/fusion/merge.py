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

from lora_fuse.checkpoint import Shard
from lora_fuse.errors import BadCheckpoint, Refused
from lora_fuse.fusion.decoded.decoded_fuser import DecodedFuser
from lora_fuse.fusion.decoded.decoded_layout import decoded_size
from lora_fuse.fusion.decoded.requantiser import Costs, Requantiser, fused_header
from lora_fuse.fusion.destination import Destination
from lora_fuse.fusion.plan import Plan
from lora_fuse.fusion.stream import FuseOptions, Progress, ShardFuser, Share, Stopped
from lora_fuse.fusion.taking_over import OtherFiles, Ways, ways_of
from lora_fuse.fusion.undone.undone_sums import UndoneSums
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
    costs: Costs | UndoneSums | None = None,
    folder: bool = False,
) -> dict[str, records.MergedFile]:
    """Write the merged checkpoint of the same kind as the base to `out`, replacing what was there.

    The bytes do not depend on the device. `generated` are files of a pipeline whose content is given here instead of
    the base's, by POSIX path; `known` are the base's files whose sha256 a lock has: they are not hashed again, or with
    `hash_inputs` all are, as they are read, and have to be those. `replace` is that of `Destination`; `beside` makes
    the texts that are put beside the result right after it, of its files. All inputs have to stay as they were when the
    plan was made, or as `states` has them from before: that is told of links to them that were made here. `costs` are
    told what it cost to quantise or undo targets, and refuse what is too much; `folder` is that of `Destination`.

    Returns:
        Every file of the result by POSIX path.

    Raises:
        NoSpace: the disk has less room than the result needs; nothing was written.
        Refused: `out` may not be replaced, see `Destination.check`; nothing was written.
        Busy: another process is writing the same result.
        Refused: the base or a LoRA turned out to be broken, or changed meanwhile; `out` is as it was.
    """
    destination = Destination.at(out, replace=replace, folder=folder)
    destination.check(plan, generated)
    place = destination.place
    ways = ways_of(plan, place, untouched)
    to_write = bytes_to_write(plan)
    need = to_write + sum(bytes_to_copy(plan, ways).values()) + space.SPARE
    space.require(files.nearest_folder(place), need, "the merged checkpoint", "make room, or write OUT on another disk")
    try:
        states = _watched(plan, states)
        pinned = {name: known[name].sha256 for name in known.keys() - _arriving(plan).keys()} if hash_inputs else {}
        with staging.staging_folder(place, _key(plan, states, pinned)) as staged:
            way = FuseOptions(device, direct=direct_io.too_large_to_cache(to_write), pinned=pinned)
            others = OtherFiles(plan, staged, generated, ways, {} if hash_inputs else known, pinned)
            written = _write_files(plan, staged, others, way, states, progress, costs)
            _refuse_changed(states)
            destination.check(plan, generated)  # it took a while
            new = staged.files
            if plan.checkpoint.kind == "file" and not folder:
                ((name, record),) = written.items()
                new = new / name
                written = {destination.out.name: record}
            merged = dict(sorted(written.items()))
            _replace(new, place, beside(merged), states)
    except OSError as error:
        raise Refused(f"cannot write {out}: {error.strerror} ({error.filename or out}); it is as it was") from error
    return merged


def _arriving(plan: Plan) -> dict[str, str]:
    """The sha256 that each file has to have which is streamed."""
    streamed = plan.checkpoint.streamed
    return {} if streamed is None else {name: record.sha256 for name, record in streamed.records.items()}


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
    for part in plan.parts:
        for path, state in part.checkpoint.states.items():
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
    """A hash of all that the bytes of finished files depend on.

    A base shard is known by its state, or also pinned; what is streamed, shard or not, by the sha256 that it has to
    have.
    """
    arriving = _arriving(plan)
    here = [shard for shard in plan.fused_shards if shard.relative not in arriving]
    shards = {shard.relative: [*astuple(states[shard.path]), pinned.get(shard.relative)] for shard in here}
    said = [ENGINE, *(part.provenance for part in plan.parts), shards | dict(sorted(arriving.items()))]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def bytes_to_write(plan: Plan) -> int:
    """Bytes that go through the engine: the fused shards, whole."""
    return sum(map(_bytes_of_component, plan.parts))


def _bytes_of_component(plan: Plan) -> int:
    if plan.is_laid_out_anew:
        return sum(decoded_size(shard, plan) for shard in plan.own_fused_shards)
    return sum(
        _stat(shard.path).st_size - len(shard.header.raw) + len(fused_header(shard, plan))
        for shard in plan.own_fused_shards
    )


def bytes_to_copy(plan: Plan, ways: Ways) -> dict[str, int]:
    """Bytes of each file that stays and is not shared with the base, by its way (`ways_of`)."""
    return {name: _stat(plan.checkpoint.locate(name)).st_size for name, way in ways.items() if way == "copy"}


def _write_files(
    plan: Plan,
    place: staging.StagingFolder,
    others: OtherFiles,
    way: FuseOptions,
    states: file_state.FileStates,
    progress: Progress,
    costs: Costs | UndoneSums | None,
) -> dict[str, records.MergedFile]:
    """Fuse the shards that change, while the other files are prepared; all of them by POSIX path."""
    whole = [] if plan.undo else [shard.relative for shard in plan.fused_shards]  # of others nothing is counted
    done = place.keep_finished([*whole, *others.arriving], progress)
    written: dict[str, records.MergedFile] = {}
    with others.prepared(progress, way.stop, done):
        try:
            for part in plan.parts:
                written |= _fuse_shards(part, place, done, way, states, progress, costs or Costs())
        except Stopped:
            others.wait()  # one of them failed
            raise
        return written | others.place(states)


def _fuse_shards(
    plan: Plan,
    place: staging.StagingFolder,
    done: Mapping[str, FileRecord],
    way: FuseOptions,
    states: file_state.FileStates,
    progress: Progress,
    costs: Costs | UndoneSums,
) -> dict[str, records.MergedFile]:
    """Fuse the shards of a component, several at a time; those that a killed run has finished are not made again."""
    to_fuse = [shard for shard in plan.own_fused_shards if shard.relative not in done]
    share = Share.of_machine(len(to_fuse), way.device)

    def fuse(shard: Shard) -> FileRecord:
        path = place.place(shard.relative)
        if shard.streamed is None:
            record = fuser.fuse(shard, path)
        else:
            record = shard.streamed.twice(shard.relative, lambda: fuser.fuse(shard, path))
        _refuse_changed(states, [shard.path])
        files.sync(path)  # while others are fused
        place.finish(shard.relative, record)
        return record

    # BLAS has one thread: its own would spin against those that take pieces.
    with (
        threadpool_limits(1, user_api="blas"),
        _fuser(plan, way, share, progress, costs) as fuser,
        ThreadPoolExecutor(share.shards, "shard") as pool,
    ):
        by_size = sorted(to_fuse, key=lambda shard: -states[shard.path].size)  # the longest last would be alone
        running = {shard.relative: pool.submit(fuse, shard) for shard in by_size}
        try:
            ended = wait(running.values(), return_when=FIRST_EXCEPTION).done
            if len(ended) < len(running) or any(shard.exception() for shard in ended):
                _stop(plan, way)
        except BaseException:  # Ctrl-C
            _stop(plan, way)
            raise
        finally:
            cancelled = [shard for shard in running.values() if shard.cancel()]
        finished = [shard for shard in running.values() if shard not in cancelled]
        failed = [error for shard in finished if (error := shard.exception()) is not None]
        for error in sorted(failed, key=lambda error: isinstance(error, Stopped)):
            raise error
        if isinstance(fuser, Requantiser):
            fuser.finish_measuring()
        if isinstance(costs, UndoneSums):
            costs.refuse_absent(str(plan.checkpoint.root))
        mine = {shard.relative for shard in plan.own_fused_shards}
        hashed = {name: record for name, record in done.items() if name in mine}
        hashed |= {name: shard.result() for name, shard in running.items()}
    return {name: records.MergedFile(record.size, record.sha256, "fused") for name, record in hashed.items()}


def _stop(plan: Plan, way: FuseOptions) -> None:
    """Have all threads end, those that wait for a Hub too."""
    way.stop.set()
    if plan.checkpoint.streamed is not None:
        plan.checkpoint.streamed.stop()


def _fuser(
    plan: Plan, way: FuseOptions, share: Share, progress: Progress, costs: Costs | UndoneSums
) -> ShardFuser | DecodedFuser | Requantiser:
    if isinstance(costs, UndoneSums):
        return ShardFuser(plan, way, share, progress, costs.read)
    if plan.requantise:
        return Requantiser(plan, way, share, progress, costs)
    if plan.is_laid_out_anew:
        return DecodedFuser(plan, way, share, progress)
    return ShardFuser(plan, way, share, progress)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise BadCheckpoint(f"{path} is not there any more ({error.strerror}); fetch it again") from error
