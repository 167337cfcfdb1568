"""The fuse of one shard as a stream: read, add, hash and write, window by window, in memory that is used again.

A fused shard has the base shard's tensors at the same offsets, so only the bytes of targets differ, and its header says
what was fused. Bytes are read to where they are changed, hashed and written. Each shard has threads that read, hash and
write; the arithmetic is spread over threads that all shards share and that take whole pieces: a library's own threads,
which meet after every operation, would spin against the others for the same cores. Memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Self

from lora_fuse.checkpoint import Shard
from lora_fuse.errors import BadCheckpoint, Rerun
from lora_fuse.fusion.adder import Adder, ReadSum, read_sum
from lora_fuse.fusion.pieces import Piece, windows
from lora_fuse.fusion.plan import Plan, Target
from lora_fuse.lora import NotFinite
from lora_fuse.machine import FileRecord, direct_io

CORES = 2  # that a shard keeps busy: one thread hashes it, and adding takes as long
MEMORY = 1 << 30  # bytes of windows, at most, of all shards that are fused at a time
PART = 4  # of the memory that is free, one part in so many at most
FEWEST = 2  # windows of a shard: one is read while the other is hashed and written
MOST = {"cuda": 8}  # threads that add, by device: each has memory of its own there

Stopped = direct_io.Stopped
Progress = Callable[[int], None]  # called with the number of bytes just written, from any thread


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """Options that the bytes do not depend on: the device, writing past the cache, and an event that stops the run.

    `pinned` are the sha256 that files of the base have to have as they are read, by POSIX path; others are not hashed.
    """

    device: str
    direct: bool
    pinned: Mapping[str, str] = field(default_factory=dict)
    stop: Event = field(default_factory=Event)


@dataclass(frozen=True, slots=True)
class Share:
    """The number of shards that are fused at a time, of windows that each has, and of threads that add to all."""

    shards: int
    windows: int
    adders: int

    @classmethod
    def of_machine(cls, shards: int, device: str) -> Share:
        """As many of some shards at a time as there are cores and memory for."""
        cores = os.cpu_count() or 1
        count = max(FEWEST, min(MEMORY, direct_io.available_memory() // PART) // direct_io.WINDOW)
        at_a_time = max(1, min(shards, cores // CORES, count // FEWEST))
        return cls(at_a_time, min(direct_io.WINDOWS, count // at_a_time), min(cores, MOST.get(device, cores)))


class AddingThreads:
    """The threads that add, which all shards of a merge share; within a `with`."""

    def __init__(self, way: FuseOptions, share: Share, progress: Progress) -> None:
        """Have threads ready; `progress` is told of what is written."""
        self._way = way
        self._share = share
        self._progress = progress
        self._adders = ThreadPoolExecutor(share.adders, "add")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._adders.shutdown(cancel_futures=True)


class ShardFuser(AddingThreads):
    """Fuses the shards of a plan, each in a thread of its caller's, which share the threads that add."""

    def __init__(
        self, plan: Plan, way: FuseOptions, share: Share, progress: Progress, read: ReadSum = read_sum
    ) -> None:
        """Have threads ready; `progress` is told of what is written, `read` is what makes a target's adder."""
        super().__init__(way, share, progress)
        self._plan = plan
        self._read = read

    def fuse(self, shard: Shard, to: Path) -> FileRecord:
        """Write the merged shard to `to`, hashing on the way.

        Raises:
            Refused: of a shard that is streamed, see `direct_io.StreamedFiles.open`.
            BadCheckpoint: the base shard cannot be read, ended early (it changed since its header was read), is not
                what it is pinned to, or holds NaN or infinity where something is added; or a sum is too large for its
                dtype.
            Stopped: the run is to stop.
        """
        pinned = self._way.pinned.get(shard.relative)
        at = len(shard.header.raw)
        with (
            shard.open() as source,
            direct_io.HashingWriter(to, self._progress, self._way.direct, self._share.windows) as output,
            _pinned(self._way.device, output.memories),
            _Pin(pinned, hashlib.sha256(shard.header.raw)) as pin,
            _Sums(self._adders, self._way.device, self._read) as sums,
        ):
            output.append(shard.header.with_metadata(self._plan.entry, self._plan.provenance))
            output.send(0)
            for window in windows(shard, self._plan.targets, direct_io.WINDOW):
                if self._way.stop.is_set():
                    raise Stopped
                data = output.room()[: sum(piece.nbytes for piece in window)]
                source.fill(data, at)
                output.send(len(data), sums.add(window, data, pin.see(data)))
                at += len(data)
            record = output.finish()
            pin.check(shard.path)
        return record


class _Pin:
    """The sha256 that a shard has to have, None for any, and a thread that hashes what is read of it."""

    def __init__(self, wanted: str | None, read_so_far: Any) -> None:
        self._wanted = wanted
        self._read_so_far = read_so_far
        self._hashing = ThreadPoolExecutor(1, "pin")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown(cancel_futures=True)

    def see(self, data: memoryview) -> list[Future[None]]:
        """Hash what was read; nothing may be added to it before what is returned is done."""
        return [] if self._wanted is None else [self._hashing.submit(self._read_so_far.update, data)]

    def check(self, path: Path) -> None:
        if self._wanted is not None:
            refuse_other_content(path, self._read_so_far.hexdigest(), self._wanted)


def refuse_other_content(path: Path, sha256: str, wanted: str) -> None:
    """Refuse a file of the base whose bytes, as they were read, are not those that were pinned.

    Raises:
        BadCheckpoint: they are not.
    """
    if sha256 != wanted:
        raise BadCheckpoint(
            f"{path} is not what was locked: read were bytes of sha256 {sha256}, the lock says {wanted}; run the "
            "download stage",
            rerun=Rerun("download", force=True),
        )


class _Sums:
    """The sums of one shard, each of them taken by a thread of a pool, in the order in which they are given."""

    def __init__(self, pool: ThreadPoolExecutor, device: str, read: ReadSum) -> None:
        self._pool = pool
        self._device = device
        self._read = read
        self._adder: Future[Adder] | None = None  # of the last target
        self._running: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._running:
            future.cancel()
        wait(self._running)  # nobody writes to the memory any more

    def add(self, window: list[Piece], data: memoryview, seen: list[Future[None]]) -> list[Future[None]]:
        """Add to each piece of a window when `seen` is done; what is returned is done when the window is."""
        ready = list(seen)
        start = 0
        for piece in window:
            if piece.target is not None:
                if piece.first_row == 0:  # the pieces of one target come one after another
                    self._adder = self._pool.submit(self._read, piece.target, self._device)
                part = data[start : start + piece.nbytes]
                ready.append(self._pool.submit(_add, piece.target, self._adder, piece.first_row, part, seen))
            start += piece.nbytes
        self._running = [future for future in self._running if not future.done()] + ready
        return ready


def _add(target: Target, adder: Future[Adder] | None, first: int, data: memoryview, seen: list[Future[None]]) -> None:
    wait(seen)
    try:
        if adder is not None:
            adder.result()(data, first)
    except NotFinite as error:
        raise BadCheckpoint(f"{target.shard.path}: {target.tensor.name!r}: {error}; nothing was written") from error


@contextmanager
def _pinned(device: str, memories: list[memoryview]) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    from lora_fuse.fusion.torch_sums import pinned

    with pinned(memories):
        yield
