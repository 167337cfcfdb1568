"""The arithmetic of a fuse: base + differences in float64, rounded once, to the right side of every tie. Pure.

``W' = round(W + sum_i D_i)``. The float64 sum has an error, which depends on thread count, library and device. It is
bounded here (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), and where the bound leaves a
doubt about the rounding, the sum is taken again in fractions. So the bytes are those of the exact sum everywhere.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from lora_fuse.deltas import Difference

NUMPY: dict[torch.dtype, npt.DTypeLike] = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # of the significand, the hidden one included
SMALLEST_NORMAL = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14, torch.float32: 2.0**-126}

Exact = Callable[[int], Fraction | None]  # the exact value of an element by its number


class NotFinite(ValueError):
    """A weight holds NaN or infinity, or would after the sum."""


def fuse_rows(rows: torch.Tensor, differences: Sequence[Difference], first: int = 0) -> None:
    """Add differences to some rows of a weight, in place.

    Args:
        rows: (n, columns), the weight's rows in its own dtype; overwritten.
        differences: of the whole weight.
        first: the number of the first row.

    Raises:
        NotFinite: a weight is NaN or infinite, or a sum is too large for the dtype.
    """
    total = _float64_buffer(rows)
    total.copy_(rows)
    low, high = torch.aminmax(rows)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise NotFinite("the base holds NaN or infinity")
    needs_base = any(not math.isfinite(one.size) for one in differences)
    weight = total.clone() if needs_base else total
    for one in differences:
        one.add_to(total, weight, first)
    reach = largest + sum(one.size for one in differences)
    columns = rows.shape[1]

    def exact(number: int) -> Fraction | None:
        row, column = divmod(number, columns)
        parts = [one.exact(first + row, column) for one in differences]
        known = [part for part in parts if part is not None]
        return sum(known, Fraction(float(rows[row, column]))) if len(known) == len(parts) else None

    operations = 2 + sum(one.roundings + 1 for one in differences)
    bound = 0.0 if needs_base else 2.0**-52 * operations * reach
    merged = round_once(total, rows.dtype, bound, exact)
    if not reach < torch.finfo(rows.dtype).max and not bool(torch.isfinite(merged).all()):
        raise NotFinite(f"a sum is too large for {rows.dtype}")
    rows.copy_(merged)


def round_once(
    values: torch.Tensor, dtype: torch.dtype, bound: float = 0.0, exact: Exact = lambda _: None
) -> torch.Tensor:
    """Round float64 values to `dtype`, to nearest, ties to even, in one step.

    torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice; what may lie at a tie is
    therefore looked at again.

    Args:
        values: float64, contiguous, any shape.
        dtype: bfloat16, float16, float32 or float64 (which is returned as it is).
        bound: how far each value may be from the exact one.
        exact: the exact one, asked for where `bound` leaves a doubt.
    """
    if dtype == torch.float64:
        return values
    rounded = values.to(dtype)
    doubtful = _doubtful(values.view(-1), dtype, bound)
    if len(doubtful):
        held, numbers = values.view(-1)[doubtful].cpu().numpy(), doubtful.cpu().numpy()
        settled = _settle(held, dtype, bound, lambda i: exact(int(numbers[i])))
        bits = torch.from_numpy(settled.view(np.uint8).reshape(len(held), -1))
        rounded.view(-1)[doubtful] = bits.view(dtype).view(-1).to(values.device)
    return rounded


def _doubtful(values: torch.Tensor, dtype: torch.dtype, bound: float) -> torch.Tensor:
    """Numbers of all elements that may lie within `bound` of a tie, or whose conversion may round twice.

    The bits that a conversion drops read 1000... at a tie. Of float32 that is seen to one unit in the last place, of
    float64 to `window`; where an element is so small that `bound` is more than that, it is doubtful anyway.
    """
    if dtype == torch.float32:
        bits, dropped, window, reach = values.view(torch.int64), 53 - BITS[dtype], 1 << 20, 2.0**33
    else:
        bits, dropped, window, reach = values.to(torch.float32).view(torch.int32), 24 - BITS[dtype], 1, 2.0**25
    mask, tie = (1 << dropped) - 1, 1 << (dropped - 1)
    near = ((bits + (window - tie)) & mask) <= 2 * window
    return torch.nonzero(near | (values.abs() < max(bound * reach, SMALLEST_NORMAL[dtype]))).view(-1)


def _settle(values: npt.NDArray[np.float64], dtype: torch.dtype, bound: float, exact: Exact) -> npt.NDArray[np.generic]:
    """Round each value by comparing it, or the exact one, with the ties on both sides of a first guess."""
    kind = np.dtype(NUMPY[dtype])
    near: npt.NDArray[Any] = values.astype(kind)
    infinity = np.array(np.inf, kind)
    steps = [np.nextafter(near, infinity), np.nextafter(near, -infinity)]
    middle = near.astype(np.float64)
    ties = [(middle + step.astype(np.float64)) / 2 for step in steps]
    bits: npt.NDArray[Any] = near.view(np.uint16 if kind.itemsize == 2 else np.uint32)
    odd = (bits & 1).astype(bool)
    above = np.where(odd, values >= ties[0], values > ties[0])
    below = np.where(odd, values <= ties[1], values < ties[1])
    for i in np.flatnonzero(np.minimum(*(np.abs(values - tie) for tie in ties)) <= bound) if bound else ():
        if (value := exact(int(i))) is not None:
            up, down = Fraction(float(ties[0][i])), Fraction(float(ties[1][i]))
            above[i] = value > up or (value == up and odd[i])
            below[i] = value < down or (value == down and odd[i])
    settled: npt.NDArray[np.generic] = np.where(above, steps[0], np.where(below, steps[1], near))
    return settled


_scratch = threading.local()  # a float64 buffer for each thread: fresh memory would cost more than the sum


def _float64_buffer(like: torch.Tensor) -> torch.Tensor:
    buffer: torch.Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < like.numel() or buffer.device != like.device:
        buffer = _scratch.buffer = torch.empty(like.numel(), dtype=torch.float64, device=like.device)
    return buffer[: like.numel()].view(like.shape)
