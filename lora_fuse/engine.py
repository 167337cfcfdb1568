"""Carries out a `Plan` on one shard: read, add, hash and write, piece by piece, in buffers that are used again.

A fused shard has the base shard's tensors at the same offsets, so only the bytes of targets differ, and its header says
what was fused. One thread reads ahead, one hashes and writes behind, and the arithmetic between them is spread over
threads that take whole pieces: torch's own threads, which meet after every operation, would spin against the other
two for the same cores. Memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

import torch

from lora_fuse.checkpoint import PROVENANCE, Shard
from lora_fuse.deltas import Decomposed, Difference, difference
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion import NotFinite, fuse_rows
from lora_fuse.plan import Target
from lora_fuse.records import FileRecord

BUFFER = 8 << 20  # bytes; one buffer
CHUNK = 1 << 19  # elements of a weight that are summed at a time: 4 MB in float64
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

Progress = Callable[[int], None]  # is told how many more bytes are done


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of a shard that goes through one buffer: whole rows of one target, or nothing to change."""

    nbytes: int
    target: Target | None = None
    first_row: int = 0


@dataclass(slots=True)
class Slot:
    """A buffer, and the write that has to end before it is filled again."""

    buffer: bytearray = field(default_factory=lambda: bytearray(BUFFER))
    written: Future[None] | None = None


def pieces(shard: Shard, targets: dict[str, Target]) -> Iterator[Piece]:
    """Cut a shard's data, in file order, into pieces of at most one buffer."""
    untouched = 0
    for name, tensor in shard.header.tensors.items():
        if name not in targets:
            untouched += tensor.nbytes
            continue
        yield from _copies(untouched)
        untouched = 0
        yield from _row_blocks(targets[name])
    yield from _copies(untouched)


def _copies(nbytes: int) -> Iterator[Piece]:
    for start in range(0, nbytes, BUFFER):
        yield Piece(min(BUFFER, nbytes - start))


def _row_blocks(target: Target) -> Iterator[Piece]:
    rows = target.tensor.shape[0]
    row_bytes = target.tensor.nbytes // rows
    block = max(1, min(CHUNK // math.prod(target.tensor.shape[1:]), BUFFER // row_bytes))
    for first in range(0, rows, block):
        yield Piece(min(block, rows - first) * row_bytes, target, first)


class Fuser:
    """Adds differences to buffers of weights on one device, several buffers at a time."""

    def __init__(self, device: str) -> None:
        self.workers = os.cpu_count() or 1
        self._device = torch.device(device)
        self._current: Target | None = None
        self._differences: list[Difference] = []

    def differences(self, target: Target) -> list[Difference]:
        """What is added to a target; its tensors are read once."""
        if target is not self._current:
            self._current, self._differences = target, _differences(target)
        return self._differences

    def fuse(self, piece: Piece, target: Target, differences: list[Difference], buffer: bytearray) -> None:
        """Overwrite the piece's rows in `buffer` with the merged ones.

        Raises:
            BadCheckpoint: the base holds NaN or infinity there, or the sum is too large for its dtype.
        """
        dtype = TORCH_DTYPES[target.tensor.dtype]
        held = torch.frombuffer(buffer, dtype=dtype, count=piece.nbytes // dtype.itemsize)
        held = held.view(-1, math.prod(target.tensor.shape[1:]))
        moved = held if any(isinstance(one, Decomposed) for one in differences) else held.to(self._device)
        try:
            fuse_rows(moved, differences, piece.first_row)
        except NotFinite as error:
            raise BadCheckpoint(f"{target.shard.path}: {target.tensor.name!r}: {error}; nothing was written") from error
        if moved is not held:
            held.copy_(moved)


def _differences(target: Target) -> list[Difference]:
    """The differences of all terms; those that need to know the whole weight have seen it."""
    found = [
        difference(term.update.format.algorithm, term.lora.read(term.update), term.update.factor, term.scale)
        for term in target.terms
    ]
    for one in found:
        if isinstance(one, Decomposed) and one.by_column:
            for first, rows in _rows_of(target):
                one.measure(rows, first)
    return found


def _rows_of(target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """A target's rows as the base has them, in float64, block by block."""
    dtype, columns = TORCH_DTYPES[target.tensor.dtype], math.prod(target.tensor.shape[1:])
    with target.shard.path.open("rb", buffering=0) as file:
        file.seek(target.tensor.start)
        for piece in _row_blocks(target):
            buffer = bytearray(piece.nbytes)
            _read_all(file, memoryview(buffer), target.shard)
            yield piece.first_row, torch.frombuffer(buffer, dtype=dtype).view(-1, columns).double()


def fuse_shard(
    shard: Shard, targets: dict[str, Target], to: Path, fuser: Fuser, provenance: str, progress: Progress
) -> FileRecord:
    """Write the merged shard to `to`, hashing on the way; `provenance` goes into its header.

    Raises:
        BadCheckpoint: the base shard cannot be read, or ended early (it changed since its header was read).
    """
    header = shard.header.with_metadata(PROVENANCE, provenance)
    size = len(header)
    with shard.path.open("rb", buffering=0) as source, to.open("wb", buffering=0) as sink:
        source.seek(len(shard.header.raw))
        sink.write(header)
        progress(len(shard.header.raw))
        output = _Output(sink, hashlib.sha256(header), progress)
        slots = [Slot() for _ in range(2 * fuser.workers + 2)]
        with _threads(fuser.workers) as (reader, workers, writer):
            for piece, slot in zip(pieces(shard, targets), cycle(slots), strict=False):
                if slot.written is not None:
                    slot.written.result()
                done: Future[None] = reader.submit(_read_all, source, memoryview(slot.buffer)[: piece.nbytes], shard)
                if piece.target is not None:
                    differences = fuser.differences(piece.target)
                    done = workers.submit(_after, done, fuser.fuse, piece, piece.target, differences, slot.buffer)
                slot.written = writer.submit(_after, done, output.emit, slot.buffer, piece.nbytes)
                size += piece.nbytes
            for slot in slots:
                if slot.written is not None:
                    slot.written.result()
    return FileRecord(size, output.digest.hexdigest())


@contextmanager
def _threads(workers: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor, ThreadPoolExecutor]]:
    """A reader, workers and a writer; while they live, torch uses no threads of its own. Pending work is dropped."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        pools = [
            ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) for count in (1, workers, 1)
        ]
        for pool in pools:
            stack.callback(pool.shutdown, cancel_futures=True)
        yield pools[0], pools[1], pools[2]


def _after(first: Future[None], work: Callable[..., None], *arguments: object) -> None:
    """Do `work` once `first` is done; its error is this one's too."""
    first.result()
    work(*arguments)


@dataclass(slots=True)
class _Output:
    """The file being written and the hash of what it holds so far."""

    sink: BinaryIO
    digest: hashlib._Hash
    progress: Progress

    def emit(self, buffer: bytearray, nbytes: int) -> None:
        view = memoryview(buffer)[:nbytes]
        self.digest.update(view)
        done = 0
        while done < nbytes:
            done += self.sink.write(view[done:])
        self.progress(nbytes)


def _read_all(source: BinaryIO, view: memoryview, shard: Shard) -> None:
    done = 0
    while done < len(view):
        got = source.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise BadCheckpoint(f"{shard.path} ended {len(view) - done} bytes early: it changed while it was read")
        done += got
