"""Numbers of a weight as float64, and whether one is the nearest of its dtype to an exact sum.

bfloat16 is taken apart as integers: what numpy is taught of it by `ml_dtypes` holds Python's lock, and no two threads
would compute at once.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]

FLOATS = ("F16", "BF16", "F32", "F64")
SLACK = 1 + 1e-9  # float64 sums taken in another order differ by about 1e-16 of the value
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIGN = 0x8000  # of a bfloat16's 16 bits


def widen(values: Array) -> Wide:
    """Values of any dtype as float64, all of which is exact for floats."""
    if values.dtype != BFLOAT16:
        return values.astype(np.float64)
    return _from_bits(np.ascontiguousarray(values).view(np.uint16))


def is_nearest(values: Array, exact: Wide) -> npt.NDArray[np.bool_]:
    """True for each value that is the nearest of its dtype to `exact`: no further than half-way to either neighbour."""
    wide = widen(values)
    down, up = neighbours(values)
    off = exact - wide
    return np.asarray((off <= (up - wide) / 2 * SLACK) & (-off <= (wide - down) / 2 * SLACK))


def neighbours(values: Array) -> tuple[Wide, Wide]:
    """The next smaller and the next larger number of the dtype, of each value; of infinity and NaN, any."""
    if values.dtype != BFLOAT16:
        infinity = np.array(np.inf, dtype=values.dtype)
        return np.nextafter(values, -infinity).astype(np.float64), np.nextafter(values, infinity).astype(np.float64)
    bits = np.ascontiguousarray(values).view(np.uint16).astype(np.int32)
    order = np.where(bits & SIGN, SIGN - bits, bits)  # floats are ordered as their bits are, but for the sign's
    return _from_order(order - 1), _from_order(order + 1)


def _from_order(order: npt.NDArray[np.int32]) -> Wide:
    return _from_bits(np.where(order < 0, SIGN - order, order).astype(np.uint16))


def _from_bits(bits: npt.NDArray[np.uint16]) -> Wide:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
