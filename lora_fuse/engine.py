"""Carries out a `Plan` on one shard: read, add, hash and write, piece by piece, in buffers that are used again.

A fused shard has the base shard's tensors at the same offsets, so only the bytes of targets differ, and its header says
what was fused. One thread reads ahead, others hash and write behind, and the arithmetic between them is spread over
threads that take whole pieces: torch's own threads, which meet after every operation, would spin against the others
for the same cores. Memory does not grow with the model.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import torch

from lora_fuse.checkpoint import PROVENANCE, Shard
from lora_fuse.deltas import Decomposed, Difference, difference
from lora_fuse.direct import Reader, block_memory
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion import NotFinite, fuse_rows
from lora_fuse.hashed import HashedFile
from lora_fuse.plan import Target
from lora_fuse.records import FileRecord

BUFFER = 8 << 20  # bytes; one buffer
WORKERS = 8  # at most: a single thread hashes, and no more are needed to keep it busy
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
    """A buffer, and what has to end before it is filled again."""

    memory: memoryview = field(default_factory=lambda: block_memory(BUFFER))
    busy: Future[None] | None = None


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
    block = max(1, BUFFER // row_bytes)
    for first in range(0, rows, block):
        yield Piece(min(block, rows - first) * row_bytes, target, first)


class Fuser:
    """Adds differences to buffers of weights on one device, several at a time; `direct` writes them past the cache."""

    def __init__(self, device: str, direct: bool) -> None:
        self.direct = direct
        self.workers = min(os.cpu_count() or 1, WORKERS)
        self._device = torch.device(device)
        self._of_thread = threading.local()
        self._current: Target | None = None
        self._differences: list[Difference] = []

    def differences(self, target: Target) -> list[Difference]:
        """What is added to a target; its tensors are read once."""
        if target is not self._current:
            self._current, self._differences = target, read_differences(target)
        return self._differences

    def fuse(self, target: Target, differences: list[Difference], first: int, data: memoryview) -> None:
        """Overwrite a target's rows in `data`, from number `first` on, with the merged ones.

        Raises:
            BadCheckpoint: the base holds NaN or infinity there, or the sum is too large for its dtype.
        """
        dtype = TORCH_DTYPES[target.tensor.dtype]
        rows = torch.frombuffer(data, dtype=dtype).view(-1, math.prod(target.tensor.shape[1:]))
        try:
            if self._device.type == "cpu" or any(isinstance(one, Decomposed) for one in differences):
                fuse_rows(rows, differences, first)
            else:
                self._fuse_there(rows, differences, first)
        except NotFinite as error:
            raise BadCheckpoint(f"{target.shard.path}: {target.tensor.name!r}: {error}; nothing was written") from error

    def _fuse_there(self, rows: torch.Tensor, differences: list[Difference], first: int) -> None:
        """On the device, in a stream of this thread's own: one piece is carried over while another is summed."""
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._of_thread.stream):
            moved = rows.to(self._device, non_blocking=True)
            fuse_rows(moved, differences, first)
            rows.copy_(moved, non_blocking=True)
            self._of_thread.stream.synchronize()

    @contextmanager
    def pinned(self, memories: Sequence[memoryview]) -> Iterator[None]:
        """Within it, the device reads and writes these itself, where it is one that can."""
        if self._device.type == "cpu":
            yield
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        held = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
        done = [one for one in held if not int(runtime.cudaHostRegister(one.data_ptr(), one.numel(), 0))]
        try:
            yield
        finally:
            for one in done:
                runtime.cudaHostUnregister(one.data_ptr())


def read_differences(target: Target) -> list[Difference]:
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
    at, memory = target.tensor.start, block_memory(BUFFER)
    with Reader(target.shard.path) as source:
        for piece in _row_blocks(target):
            data = _read(source, memory, at, piece.nbytes, target.shard)
            yield piece.first_row, torch.frombuffer(data, dtype=dtype).view(-1, columns).double()
            at += piece.nbytes


def fuse_shard(
    shard: Shard, targets: dict[str, Target], to: Path, fuser: Fuser, provenance: str, progress: Progress
) -> FileRecord:
    """Write the merged shard to `to`, hashing on the way; `provenance` goes into its header.

    Raises:
        BadCheckpoint: the base shard cannot be read, or ended early (it changed since its header was read).
    """
    slots = [Slot() for _ in range(2 * fuser.workers + 2)]
    with (
        Reader(shard.path) as source,
        HashedFile(to, progress, fuser.direct) as output,
        fuser.pinned([slot.memory for slot in slots]),
        _threads(fuser.workers) as (reader, workers, packer),
    ):
        output.append(shard.header.with_metadata(PROVENANCE, provenance))
        at = len(shard.header.raw)
        for piece, slot in zip(pieces(shard, targets), cycle(slots), strict=False):
            if slot.busy is not None:
                slot.busy.result()
            data = reader.submit(_read, source, slot.memory, at, piece.nbytes, shard)
            if piece.target is not None:
                differences = fuser.differences(piece.target)
                data = workers.submit(_fuse, fuser, piece.target, differences, piece.first_row, data)
            slot.busy = packer.submit(lambda ready: output.append(ready.result()), data)
            at += piece.nbytes
        for slot in slots:
            if slot.busy is not None:
                slot.busy.result()
        return output.finish()


def _read(source: Reader, memory: memoryview, start: int, nbytes: int, shard: Shard) -> memoryview:
    data = source.read(memory, start, nbytes)
    if len(data) < nbytes:
        raise BadCheckpoint(f"{shard.path} ended {nbytes - len(data)} bytes early: it changed while it was read")
    return data


def _fuse(
    fuser: Fuser, target: Target, differences: list[Difference], first: int, read: Future[memoryview]
) -> memoryview:
    data = read.result()
    fuser.fuse(target, differences, first, data)
    return data


@contextmanager
def _threads(workers: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor, ThreadPoolExecutor]]:
    """A reader, workers and a packer; while they live, torch uses no threads of its own. Pending work is dropped."""
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
