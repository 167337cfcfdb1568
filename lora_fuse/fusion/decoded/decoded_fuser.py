"""The fuse of one shard into other dtypes: codes are decoded, sums rounded once, hashed and written, rows by rows.

``W' = round(W + sum_i D_i)``, where W may be codes: what those stand for is known to float32, the sum is exact, and it
is rounded once. Nothing is ever added to codes. A few pieces are under way at a time: memory does not grow with the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Shard, dtypes
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion.adder import base_rows, read_deltas
from lora_fuse.fusion.decoded.decoded_layout import DecodedTensor, decoded_header, decoded_tensors
from lora_fuse.fusion.pieces import PIECE, row_pieces
from lora_fuse.fusion.plan import Plan, Target
from lora_fuse.fusion.stream import AddingThreads, FuseOptions, Progress, Share, Stopped, refuse_other_content
from lora_fuse.lora import Delta, NotFinite
from lora_fuse.machine import FileRecord, direct_io, file_state, files

if TYPE_CHECKING:
    from pathlib import Path

AHEAD = 2  # pieces under way for each thread that makes them
Work = Callable[[], memoryview]


class DecodedFuser(AddingThreads):
    """As `ShardFuser`, for a plan whose tensors get other dtypes."""

    def __init__(self, plan: Plan, way: FuseOptions, share: Share, progress: Progress) -> None:
        """Have threads ready; `progress` is told of what is written."""
        super().__init__(way, share, progress)
        self._plan = plan

    def fuse(self, shard: Shard, to: Path) -> FileRecord:
        """Write the merged shard to `to`, hashing on the way.

        Raises:
            BadCheckpoint, Stopped: see `ShardFuser.fuse`; or a code stands for no finite number.
        """
        if (pinned := self._way.pinned.get(shard.relative)) is not None:
            refuse_other_content(shard.path, files.hash_file(shard.path).sha256, pinned)
        tensors = decoded_tensors(shard, self._plan)
        with (
            shard.open() as source,
            direct_io.HashingWriter(to, self._progress, self._way.direct, self._share.windows) as output,
        ):
            output.append(decoded_header(shard, tensors, self._plan.provenance))
            work = self._unless_stopped(self._work(tensors, shard, source))
            for made in file_state.in_order(self._adders, work, AHEAD * self._share.adders + 1):
                output.append(made)
            return output.finish()

    def _unless_stopped(self, work: Iterable[Work]) -> Iterator[tuple[int, Work]]:
        """Each piece of work, all of the same weight, until the run is to stop."""
        for one in work:
            if self._way.stop.is_set():
                raise Stopped
            yield 1, one

    def _work(self, tensors: Iterable[DecodedTensor], shard: Shard, source: direct_io.ByteSource) -> Iterator[Work]:
        """The work of each piece of the file; what it needs of the base is read before it is given."""
        for tensor in tensors:
            target = self._plan.targets.get(tensor.name)
            if target is None and tensor.stored is None:
                for start in range(tensor.source.start, tensor.source.end, PIECE):
                    data = read(source, start, min(PIECE, tensor.source.end - start))
                    same = tensor.dtype == tensor.source.dtype
                    yield partial(_as_it_is, data) if same else partial(_converted, shard, tensor, start, data)
                continue
            deltas = None if target is None else self._adders.submit(read_deltas, target)
            whole = target or Target(tensor.source, shard, (), tensor.stored)
            at = tensor.source.start
            for piece in row_pieces(whole):
                data = read(source, at, piece.nbytes)
                yield partial(_made, whole, deltas, tensor.dtype, piece.first_row, data, self._way.device)
                at += piece.nbytes


def read(source: direct_io.ByteSource, start: int, nbytes: int) -> bytearray:
    """Read bytes of a shard into memory of their own."""
    data = bytearray(nbytes)
    source.fill(memoryview(data), start)
    return data


def _as_it_is(data: bytearray) -> memoryview:
    return memoryview(data)


def _converted(shard: Shard, tensor: DecodedTensor, start: int, data: bytearray) -> memoryview:
    """Some values of the base, from a place on, as the bytes of another dtype, rounded once.

    Raises:
        BadCheckpoint: one is no finite number, or is too large for the dtype.
    """
    import torch

    from lora_fuse.fusion.torch_sums import as_rows, sums_of_rows

    first = (start - tensor.source.start) * 8 // dtypes.DTYPES[tensor.source.dtype].bits
    values = as_rows(memoryview(data), tensor.source.dtype, 1)
    with _naming(shard, tensor.name, tensor.dtype):
        merged = sums_of_rows(values, dtypes.DTYPES[tensor.dtype].torch, [], first, "cpu")
    return _bytes_of(merged.view(torch.uint8).numpy())


@contextmanager
def _naming(shard: Shard, name: str, dtype: str) -> Iterator[None]:
    try:
        yield
    except NotFinite as error:
        way_out = "; write bfloat16 or float32 (--dtype, fuse.dtype)" if dtype == "F16" else ""
        raise BadCheckpoint(f"{shard.path}: {name!r}: {error}; nothing was written{way_out}") from error


def _made(
    target: Target, deltas: Future[list[Delta]] | None, dtype: str, first: int, data: bytearray, device: str
) -> memoryview:
    """Rows of a merged tensor as the bytes of a dtype; `data` are those of the base, codes or not."""
    with _naming(target.shard, target.tensor.name, dtype):
        rows = base_rows(target, memoryview(data), first)
        if deltas is None:
            return _bytes_of(_rounded(rows.numpy(), dtype))
        import torch

        from lora_fuse.fusion.torch_sums import sums_of_rows

        merged = sums_of_rows(rows, dtypes.DTYPES[dtype].torch, deltas.result(), first, device)
        return _bytes_of(merged.view(torch.uint8).numpy())


def _rounded(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    """Values rounded to nearest, ties to even.

    Raises:
        NotFinite: one is no finite number, or is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        merged = values.astype(dtypes.DTYPES[dtype].numpy)
    if not np.isfinite(merged).all():
        raise NotFinite(f"its codes stand for NaN, infinity or what is too large for {dtype}")
    return merged


def _bytes_of(array: npt.NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
