"""Any deltas added to weights of any dtype by torch, on CPU or GPU: ``W' = round(W + sum_i D_i)``, rounded once.

The float64 sum has an error, which depends on thread count, library and device. It is bounded here for any order of
summation (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), and where the bound leaves a
doubt about the rounding, the sum is taken again in fractions. So the bytes are those of the exact sum everywhere.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

import torch

from lora_fuse.checkpoint import dtypes
from lora_fuse.fusion.torch_rounding import FLOAT_FORMATS, round_close, round_doubtful, round_most, scratch
from lora_fuse.lora import Decomposed, Delta, DoubleDouble, NotFinite, exact

BLOCK = (512, 1024)  # rows and columns that are summed at a time on a CPU: 4 MB in float64
AT_ONCE = 1 << 13  # sums that are taken in two float64 each at a time
_of_thread = threading.local()


def add_to_rows(rows: torch.Tensor, deltas: Sequence[Delta], first: int, device: str) -> None:
    """As `fuse_rows`, of rows in main memory, on a device; a square root is taken on the CPU, the same everywhere."""
    torch.set_num_threads(1)  # of this thread: its threads would spin against those of the other pieces
    if device == "cpu" or any(isinstance(delta, Decomposed) for delta in deltas):
        fuse_rows(rows, deltas, first)
        return
    if not hasattr(_of_thread, "stream"):  # one piece is carried over while another is summed
        _of_thread.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(_of_thread.stream):
        moved = rows.to(device, non_blocking=True)
        fuse_rows(moved, deltas, first)
        rows.copy_(moved, non_blocking=True)
        _of_thread.stream.synchronize()


def sums_of_rows(
    rows: torch.Tensor, dtype: torch.dtype, deltas: Sequence[Delta], first: int, device: str
) -> torch.Tensor:
    """As `round_sums`, of rows in main memory, on a device, and to new memory of a dtype; see `add_to_rows`."""
    torch.set_num_threads(1)
    if device == "cpu" or any(isinstance(delta, Decomposed) for delta in deltas):
        merged = torch.empty(rows.shape, dtype=dtype)
        round_sums(rows, merged, deltas, first)
        return merged
    moved = rows.to(device)
    on_device = torch.empty(rows.shape, dtype=dtype, device=device)
    round_sums(moved, on_device, deltas, first)
    return on_device.cpu()


def as_rows(data: memoryview, dtype: str, columns: int) -> torch.Tensor:
    """Bytes of a safetensors dtype as a matrix, without a copy."""
    return torch.frombuffer(data, dtype=dtypes.DTYPES[dtype].torch).view(-1, columns)


@contextmanager
def pinned(memories: Sequence[memoryview]) -> Iterator[None]:
    """Within it, a GPU reads and writes these itself, where it is one that can."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    buffers = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
    done = [buffer for buffer in buffers if not int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))]
    try:
        yield
    finally:
        for buffer in done:
            runtime.cudaHostUnregister(buffer.data_ptr())


def fuse_rows(rows: torch.Tensor, deltas: Sequence[Delta], first: int = 0) -> None:
    """Add deltas to `rows`, (n, columns), of a weight in its own dtype, in place; see `round_sums`."""
    round_sums(rows, rows, deltas, first)


def round_sums(rows: torch.Tensor, merged: torch.Tensor, deltas: Sequence[Delta], first: int = 0) -> None:
    """Write the sums of deltas and of `rows`, (n, columns), to `merged`, as large, rounded once to its dtype.

    `first` is the number of the first row; `merged` may be `rows`. The result is exact but for a delta that has a root
    in it (DoRA), whose float64 sum is rounded, and for float64, to which the float64 sum is written.

    Raises:
        NotFinite: a weight is NaN or infinite, or a sum is too large for the dtype.
    """
    low, high = torch.aminmax(rows)
    reach = max(-float(low), float(high))
    if not math.isfinite(reach):
        raise NotFinite("the base holds NaN or infinity")
    reach += sum(delta.size for delta in deltas)
    operations = 2 + sum(delta.roundings + 1 for delta in deltas)
    error = 2.0**-52 * operations * reach if math.isfinite(reach) else 0.0
    doubts = [
        _sum_block(*parts, deltas, row, column, first, error)
        for row, column, parts in _blocks((rows, merged), whole_rows=not math.isfinite(reach))
    ]
    _settle(merged, _Doubts(*(torch.cat(parts) for parts in zip(*doubts, strict=True))), deltas, first, error)
    if not reach < torch.finfo(merged.dtype).max and not bool(torch.isfinite(merged).all()):
        raise NotFinite(_too_large(rows, merged, deltas, first))


def _too_large(rows: torch.Tensor, merged: torch.Tensor, deltas: Sequence[Delta], first: int) -> str:
    """Name the first sum that its dtype has no number for."""
    row, column = (~torch.isfinite(merged)).nonzero()[0].tolist()
    weight = rows[row : row + 1].double().cpu()
    total = weight.clone()
    for delta in deltas:
        delta.add_to(total, weight, first + row, 0)
    value = f"{float(total[0, column]):.9g} " if bool(total.isfinite().all()) else ""  # or `rows` is overwritten
    most = f"its largest number is {torch.finfo(merged.dtype).max:.9g}"
    return f"a sum is too large for {merged.dtype}: {value}in row {first + row}, column {column}, and {most}"


def _blocks(
    both: tuple[torch.Tensor, torch.Tensor], whole_rows: bool
) -> Iterator[tuple[int, int, tuple[torch.Tensor, torch.Tensor]]]:
    """Parts of both by their first row and column: on the CPU so small that what is made of one stays in a cache."""
    rows, merged = both
    if rows.device.type != "cpu":
        yield 0, 0, both
        return
    width = rows.shape[1] if whole_rows else BLOCK[1]
    height = max(1, BLOCK[0] * BLOCK[1] // min(width, rows.shape[1]))
    for row in range(0, rows.shape[0], height):
        for column in range(0, rows.shape[1], width):
            place = slice(row, row + height), slice(column, column + width)
            yield row, column, (rows[place], merged[place])


class _Doubts(NamedTuple):
    """Elements that are to be rounded again: where they are in the rows, their weight and their float64 sum."""

    row: torch.Tensor
    column: torch.Tensor
    weight: torch.Tensor
    total: torch.Tensor


def _sum_block(
    block: torch.Tensor,
    merged: torch.Tensor,
    deltas: Sequence[Delta],
    row: int,
    column: int,
    first: int,
    error: float,
) -> _Doubts:
    total = scratch("total", block.shape, torch.float64, block.device).copy_(block)
    weight = total.clone() if error == 0 else total
    for delta in deltas:
        delta.add_to(total, weight, first + row, column)
    if merged.dtype == torch.float64:
        near = total
        doubtful = torch.empty(0, dtype=torch.int64, device=block.device)
    else:
        near, doubtful = round_most(total, error, merged.dtype)
    i = doubtful // block.shape[1]
    j = doubtful % block.shape[1]
    doubts = _Doubts(row + i, column + j, block[i, j], total[i, j])
    merged.copy_(near)
    return doubts


def _settle(rows: torch.Tensor, doubts: _Doubts, deltas: Sequence[Delta], first: int, error: float) -> None:
    if not len(doubts.row):
        return
    merged, undecided = round_doubtful(doubts.total, error, rows.dtype)
    for start in range(0, len(undecided), AT_ONCE):
        part = undecided[start : start + AT_ONCE]
        few = _Doubts(*(of_all[part].cpu() for of_all in doubts))
        merged[part] = _settled(few, deltas, first, rows.dtype).to(rows.device)
    rows[doubts.row, doubts.column] = merged


def _settled(doubts: _Doubts, deltas: Sequence[Delta], first: int, dtype: torch.dtype) -> torch.Tensor:
    """The exact sums, rounded: by two float64 each, and what those leave undecided in fractions."""
    row = doubts.row.numpy() + first
    column = doubts.column.numpy()
    sums = DoubleDouble(doubts.weight.double().numpy())
    for delta in deltas:
        sums.plus(delta.close(row, column))
    merged, undecided = round_close(sums, dtype)
    for number in undecided.tolist():
        parts = (delta.exact(int(row[number]), int(column[number])) for delta in deltas)
        total = sum(parts, Fraction(float(doubts.weight[number])))
        merged[number] = exact.nearest(total, FLOAT_FORMATS[dtype])
    return merged
