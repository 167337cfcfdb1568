"""Ways in which the base's files that do not change get into a merge: shared with the base, or copied.

Text is copied, as it is edited in place. Weights are large, and only ever replaced. Where blocks cannot be shared
(`files.Untouched`), a hard link is as good as that until somebody opens one of its two names and writes: it is made of
read-only files only. Those of the Hub client's cache are made so, as the client makes those that repositories share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion.plan import Plan
from lora_fuse.fusion.stream import Stopped, refuse_other_content
from lora_fuse.machine import direct_io, file_state, files, staging
from lora_fuse.recipe import hf_cache, records

Ways = Mapping[str, files.Untouched]


def ways_of(plan: Plan, place: Path, untouched: files.Untouched) -> Ways:
    """The way of each file of the base that does not change to `place`, by POSIX path, without ``auto``."""
    fused = {shard.relative for shard in plan.fused_shards}
    folder = files.nearest_folder(place)
    streamed = plan.checkpoint.streamed
    others = [*(shard.relative for shard in plan.shards), *plan.checkpoint.others]
    shares: dict[int, bool] = {}  # blocks, by device
    ways: dict[str, files.Untouched] = {}
    for name in others:
        if name in fused:
            continue
        given = plan.checkpoint.locate(name)
        source = given.resolve()
        is_weight = repository_files.is_weights(given.name) or repository_files.is_weights(source.name)
        device = _device(source)
        ways[name] = "copy"
        arrives = streamed is not None and name in streamed.records
        if arrives or not is_weight or untouched == "copy" or device != folder.stat().st_dev:
            continue
        if untouched != "hardlink" and device not in shares:
            shares[device] = files.can_reflink(source, folder)
        if untouched != "hardlink" and shares[device]:
            ways[name] = "reflink"
        elif untouched == "hardlink" or (untouched == "auto" and (files.is_read_only(source) or _is_cached(given))):
            ways[name] = "hardlink"
    return ways


class OtherFiles:
    """The files of a merge that are no fused shards: the base's that do not change, and the generated ones.

    They are copied and hashed on threads of their own, while shards are fused. Hard links are made in the end.
    """

    def __init__(
        self,
        plan: Plan,
        place: staging.StagingFolder,
        generated: Mapping[str, bytes],
        ways: Ways,
        known: Mapping[str, files.FileRecord],
        pinned: Mapping[str, str],
    ) -> None:
        """List them; see `lora_fuse.fusion.merge.write_merged`. Files that are `known` are not hashed."""
        fused = {shard.relative for shard in plan.fused_shards}
        same = [shard.relative for shard in plan.shards if shard.relative not in fused]
        self._sources = {name: plan.checkpoint.locate(name) for name in [*same, *plan.checkpoint.others]}
        self._place = place
        self._generated = generated
        self._ways = ways
        self._known = known
        self._pinned = pinned
        self._streamed = plan.checkpoint.streamed
        self._prepared: dict[str, Future[files.FileRecord]] = {}

    @property
    def arriving(self) -> list[str]:
        """The files that are streamed, by POSIX path."""
        coming = {} if self._streamed is None else self._streamed.records
        return [name for name in self._sources if name in coming and name not in self._generated]

    @contextmanager
    def prepared(
        self, progress: Callable[[int], None], stop: Event, done: Mapping[str, files.FileRecord]
    ) -> Iterator[None]:
        """Copy and hash within it, the largest first; `progress` is told of what was copied, an error sets `stop`.

        Those of `arriving` that are `done` were finished by an earlier run.
        """
        states = {name: file_state.state_of(source) for name, source in self._sources.items()}
        sizes = {name: state.size if state else 0 for name, state in states.items()}
        streamed = self._streamed
        arriving = set(self.arriving)

        def prepare(name: str, advance: file_state.Advance) -> files.FileRecord:
            if name in done:
                return done[name]
            try:
                if name in arriving and streamed is not None:
                    return self._arrived(streamed, name, stop, advance, progress)
                record = self._prepare(name, advance)
            except Exception:
                stop.set()
                if streamed is not None:
                    streamed.stop()
                raise
            progress(sizes[name] if self._ways[name] == "copy" else 0)
            return record

        with file_state.HashingThreads(lambda _: None) as threads:
            for name in sorted(sizes, key=lambda name: -sizes[name]):
                self._prepared[name] = threads.submit(prepare, name)
            yield

    def _arrived(
        self,
        streamed: direct_io.StreamedFiles,
        name: str,
        stop: Event,
        advance: file_state.Advance,
        progress: Callable[[int], None],
    ) -> files.FileRecord:
        """Write a file that is streamed to its place, and mark it as whole."""
        placed = self._place.place(name)

        def write() -> files.FileRecord:
            size = streamed.records[name].size
            with (
                streamed.open(name) as source,
                direct_io.HashingWriter(placed, progress, direct=False, windows=2) as output,
            ):
                for start in range(0, size, direct_io.WINDOW):
                    if stop.is_set():
                        raise Stopped
                    advance(0)
                    part = min(direct_io.WINDOW, size - start)
                    source.fill(output.room()[:part], start)
                    output.send(part)
                return output.finish()

        record = streamed.twice(name, write)
        files.sync(placed)
        self._place.finish(name, record)
        return record

    def _prepare(self, name: str, advance: file_state.Advance) -> files.FileRecord:
        source = self._sources[name]
        placed = source
        if name not in self._generated:
            if self._ways[name] != "hardlink":
                placed = self._place.place(name)
                files.take_over(source.resolve(), placed, self._ways[name])
            files.sync(placed)  # what is on the disk now need not be waited for in the end
        return self._known[name] if name in self._known else self._hash(name, placed, advance)

    def _hash(self, name: str, placed: Path, advance: file_state.Advance = lambda _: None) -> files.FileRecord:
        record = files.hash_file(placed, advance)
        refuse_other_content(self._sources[name], record.sha256, self._pinned.get(name, record.sha256))
        return record

    def wait(self) -> None:
        """Wait for what is `prepared`.

        Raises:
            BadCheckpoint: a file of the base is not what it is pinned to.
            OSError: one cannot be read or written.
        """
        wait(self._prepared.values(), return_when=FIRST_EXCEPTION)
        for future in self._prepared.values():
            if future.done():
                future.result()

    def place(self, states: file_state.FileStates) -> dict[str, records.MergedFile]:
        """Put the rest in its place; returns all of these files by POSIX path.

        Raises:
            BadCheckpoint, OSError: see `wait`.
        """
        self.wait()
        written = {}
        for name, source in self._sources.items():
            record = self._prepared[name].result()
            if name not in self._generated and self._ways[name] == "hardlink":
                placed = self._place.place(name)
                link(source, placed, states)
                if name not in self._known and not placed.samefile(source):  # a copy after all
                    record = self._hash(name, placed)
            states.add(source, states[source], record)
            if name not in self._generated:
                written[name] = records.MergedFile(record.size, record.sha256, "base")
        for name, content in self._generated.items():
            self._place.place(name).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            written[name] = records.MergedFile(len(content), sha256, "generated")
        return written


def link(given: Path, target: Path, states: file_state.FileStates) -> None:
    """Make `target` a second name of a base's file, through links, or a copy; one of the Hub's cache is read-only then.

    The `states` of the base's files are told of the link.
    """
    source = given.resolve()
    with states.linking([given]), suppress(OSError):  # another filesystem, or another user's file
        if _is_cached(given):
            files.make_read_only(source)
        os.link(source, target)
        return
    files.take_over(source, target, "copy")


def _is_cached(given: Path) -> bool:
    """True for a file of a snapshot in the Hub client's cache, wherever its content lies there."""
    repo_id, _ = hf_cache.cached_from(given.parent.resolve() / given.name)
    return repo_id is not None


def _device(source: Path) -> int:
    try:
        return source.stat().st_dev
    except OSError as error:
        raise BadCheckpoint(f"{source} is not there any more ({error.strerror}); fetch it again") from error
