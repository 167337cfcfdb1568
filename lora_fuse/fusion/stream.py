"""The fuse of one shard as a stream: read, add, hash and write, piece by piece, in buffers that are used again.

A fused shard has the base shard's tensors at the same offsets, so only the bytes of targets differ, and its header says
what was fused. One thread reads ahead, others hash and write behind, and the arithmetic between them is spread over
threads that take whole pieces: a library's own threads, which meet after every operation, would spin against the others
for the same cores. Memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Event
from typing import Any

from lora_fuse.checkpoint import PROVENANCE, Shard
from lora_fuse.errors import BadCheckpoint, Rerun
from lora_fuse.fusion.adder import Adder, read_sum
from lora_fuse.fusion.pieces import BUFFER, pieces
from lora_fuse.fusion.plan import Target
from lora_fuse.lora import NotFinite
from lora_fuse.machine import FileRecord, direct_io

WORKERS = 4  # at most, of a shard: a single thread hashes it, and more are not needed to keep that one busy
SHARDS = 3  # at a time, at most: each has buffers of its own, some 200 MB

Progress = Callable[[int], None]  # called with the number of bytes just written, from any thread


@dataclass(slots=True)
class Buffer:
    """A buffer, and what has to end before it is filled again."""

    memory: memoryview = field(default_factory=lambda: direct_io.block_memory(BUFFER))
    busy: Future[None] | None = None


class Stopped(Exception):
    """Another shard failed, or the run was interrupted."""


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """Options that the bytes do not depend on: the device, writing past the cache, and an event that stops the run.

    `pinned` are the sha256 that files of the base have to have as they are read, by POSIX path; others are not hashed.
    """

    device: str
    direct: bool
    pinned: Mapping[str, str] = field(default_factory=dict)
    stop: Event = field(default_factory=Event)

    @property
    def shards(self) -> int:
        """The number of shards that are fused at a time."""
        return max(1, min(_cores() // WORKERS, SHARDS))

    @property
    def workers(self) -> int:
        """The number of threads that add to one shard."""
        return min(_cores(), WORKERS)


def _cores() -> int:
    return os.cpu_count() or 1


def fuse_shard(
    shard: Shard, targets: dict[str, Target], to: Path, way: FuseOptions, provenance: str, progress: Progress
) -> FileRecord:
    """Write the merged shard to `to`, hashing on the way; `provenance` goes into its header.

    Raises:
        BadCheckpoint: the base shard cannot be read, ended early (it changed since its header was read), is not what
            it is pinned to, or holds NaN or infinity where something is added; or a sum is too large for its dtype.
        Stopped: `way.stop` was set.
    """
    slots = [Buffer() for _ in range(2 * way.workers + 2)]
    pin = _Pin(way.pinned.get(shard.relative), hashlib.sha256(shard.header.raw))
    with (
        direct_io.open_shard(shard.path) as source,
        direct_io.HashingWriter(to, progress, way.direct) as output,
        _pinned(way.device, slots),
        _threads(way.workers) as (reader, workers, packer),
    ):
        output.append(shard.header.with_metadata(PROVENANCE, provenance))
        at = len(shard.header.raw)
        for piece, slot in zip(pieces(shard, targets), cycle(slots), strict=False):
            if way.stop.is_set():
                raise Stopped
            if slot.busy is not None:
                slot.busy.result()
            data = reader.submit(pin.read, source, slot.memory, at, piece.nbytes)
            if piece.target is not None:
                if piece.first_row == 0:  # the pieces of one target come one after another
                    adder = read_sum(piece.target, way.device)
                data = workers.submit(_add, piece.target, adder, piece.first_row, data)
            slot.busy = packer.submit(lambda ready: output.append(ready.result()), data)
            at += piece.nbytes
        for slot in slots:
            if slot.busy is not None:
                slot.busy.result()
        pin.check(shard.path)
        return output.finish()


@dataclass(frozen=True, slots=True)
class _Pin:
    """The sha256 that a shard has to have, None for any, and the hash of header and bytes that were read so far."""

    wanted: str | None
    read_so_far: Any

    def read(self, source: direct_io.Reader, memory: memoryview, start: int, nbytes: int) -> memoryview:
        """Read the next bytes, before anything is added to them."""
        data = direct_io.read_exactly(source, memory, start, nbytes)
        if self.wanted is not None:
            self.read_so_far.update(data)
        return data

    def check(self, path: Path) -> None:
        if self.wanted is not None:
            refuse_other_content(path, self.read_so_far.hexdigest(), self.wanted)


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


def _add(target: Target, adder: Adder, first: int, read: Future[memoryview]) -> memoryview:
    data = read.result()
    try:
        adder(data, first)
    except NotFinite as error:
        raise BadCheckpoint(f"{target.shard.path}: {target.tensor.name!r}: {error}; nothing was written") from error
    return data


@contextmanager
def _threads(workers: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor, ThreadPoolExecutor]]:
    """A reader, workers and a packer. Pending work is dropped."""
    with ExitStack() as stack:
        pools = [ThreadPoolExecutor(count, name) for count, name in ((1, "read"), (workers, "add"), (1, "pack"))]
        for pool in pools:
            stack.callback(pool.shutdown, cancel_futures=True)
        yield pools[0], pools[1], pools[2]


@contextmanager
def _pinned(device: str, slots: list[Buffer]) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    from lora_fuse.fusion.torch_sums import pinned

    with pinned([slot.memory for slot in slots]):
        yield
