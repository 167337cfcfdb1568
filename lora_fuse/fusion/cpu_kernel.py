"""The inner loop of `lowrank`, compiled for the machine by numba: one pass over a product instead of ten. Pure.

The compiled code is kept beside this file, or in the user's cache; the first use on a machine takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from lora_fuse.lora import exact

UNIT = 2.0**-24  # half a unit in the last place of float32, relative

F32, U16, U32, U64 = np.float32, np.uint16, np.uint32, np.uint64  # numba widens what is not converted
Function = TypeVar("Function", bound=Callable[..., Any])


class Factors(NamedTuple):
    """The two factors of a difference: a row of each makes a value; and what bounds the error of a float32 product."""

    a: npt.NDArray[np.float64]  # (rows, rank)
    b: npt.NDArray[np.float64]  # (columns, rank): transposed
    row_error: npt.NDArray[np.float32]  # (rows,)
    column_length: npt.NDArray[np.float32]  # (columns,): times the row's error it is the error of a value
    lost: np.float32  # and this, to numbers too small for float32
    error: np.float64  # of a float64 sum


def compiled(fastmath: frozenset[str] = frozenset()) -> Callable[[Function], Function]:
    """Compile at the first call; keep the result where there is a place for it."""

    def compile_(function: Function) -> Function:
        make: Any = numba.njit
        options = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
        try:
            made: Function = make(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's can be written to
            made = make(**options)(function)
        return made

    return compile_


@compiled()
def largest(bits: npt.NDArray[np.uint16]) -> np.uint16:
    """The largest absolute value in some rows, as its bits."""
    top = U16(0)
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            top = max(top, U16(bits[i, j] & U16(0x7FFF)))
    return top


@compiled()
def _value(bits: np.uint16, dropped: np.uint32, scale: np.float32) -> np.float32:
    magnitude = U32(U32(bits & U16(0x7FFF)) << dropped)
    return F32(U32(magnitude | U32(U32(bits & U16(0x8000)) << U32(16))).view(F32) * scale)


@compiled()
def _bits(value: np.float64, precision: int, bias: int) -> np.uint16:
    """Round a float64 that is not too large: to nearest, ties to even."""
    size = abs(value)
    if size < 2.0 ** (1 - bias):
        magnitude = U64(np.rint(size * 2.0 ** (bias + precision - 2)))
    else:
        dropped = U64(53 - precision)
        wide = np.float64(size).view(U64)
        below_half = U64((U64(1) << U64(dropped - U64(1))) - U64(1))
        odd = U64(U64(wide >> dropped) & U64(1))
        magnitude = U64(U64(U64(wide + below_half + odd) >> dropped) - U64((1023 - bias) << (precision - 1)))
    return U16(magnitude | U64(0x8000)) if np.signbit(value) else U16(magnitude)


@compiled(fastmath=frozenset({"reassoc", "contract"}))  # the bound holds for any order of the sum
def _inner_product(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> np.float64:
    total = np.float64(0)
    for r in range(a.shape[0]):
        total += a[r] * b[r]
    return total


def adder(kind: exact.FloatFormat) -> Callable[..., int]:
    """Compile the loop for one format of 16 bits: with its constants in it, it is twice as fast as with variables."""
    precision, bias = kind.precision, kind.bias
    dropped, scale = exact.FLOAT32.precision - precision, 2.0 ** (exact.FLOAT32.bias - bias)
    below_half, back, smallest = (1 << (dropped - 1)) - 1, 1 / scale, kind.smallest_normal
    wider = (
        bias == exact.FLOAT32.bias
    )  # float32 has the same exponents: no scale, and no number that it has too few bits for

    def add(
        bits: npt.NDArray[np.uint16],
        product: npt.NDArray[np.float32],
        first: int,
        factors: Factors,
        left: npt.NDArray[np.int64],
    ) -> int:
        """Overwrite weights by their sum with a product, rounded once, as far as float64 decides it.

        Both ends of the interval that a float32 sum is in are rounded: where they become one number, so does the sum.

        Args:
            bits: (n, m), the weights.
            product: (n, m), their part of ``a @ b.T`` in float32.
            first: the row of `factors.a` that belongs to their first row.
            factors: of the whole product.
            left: (n * m,), is given the flat numbers of the weights that stay as they were, undecided by float64.

        Returns:
            How many these are; or -1 where a product is further off than float32 allows.
        """
        n, m = bits.shape
        merged, doubt = np.empty(m, U16), np.zeros((m + 3) // 4 * 4, U16)
        wide = doubt.view(U64)  # doubts are few: four at a time
        column_length, lost = factors.column_length, factors.lost
        count = 0
        for i in range(n):
            weights, added = bits[i], product[i]
            row_error, a = factors.row_error[first + i], factors.a[first + i]
            for j in range(m):
                near = F32(_value(weights[j], U32(dropped), F32(scale)) + added[j])
                size = abs(near)
                off = F32(F32(row_error * column_length[j]) + F32(F32(size * F32(4 * UNIT)) + lost))
                low, high = F32(F32(near - off) * F32(back)).view(U32), F32(F32(near + off) * F32(back)).view(U32)
                sign = U32(U32(low >> U32(16)) & U32(0x8000))
                low = U32(U32(U32(low + U32(below_half)) + U32(U32(low >> U32(dropped)) & U32(1))) >> U32(dropped))
                high = U32(U32(U32(high + U32(below_half)) + U32(U32(high >> U32(dropped)) & U32(1))) >> U32(dropped))
                merged[j] = U16(U32(low & U32(0x7FFF)) | sign)
                doubt[j] = U16(low ^ high) if wider else U16(U32(low ^ high) | U32(size < F32(smallest)))
            for k in range(wide.shape[0]):
                if wide[k] == 0:
                    continue
                for j in range(4 * k, min(4 * k + 4, m)):
                    if doubt[j] == 0:
                        continue
                    weight, b = np.float64(_value(weights[j], U32(dropped), F32(scale))), factors.b[j]
                    total = weight + _inner_product(a, b)
                    near = F32(F32(weight) + added[j])
                    off = row_error * column_length[j] + abs(near) * F32(4 * UNIT) + lost
                    if not abs(total - near) <= off:
                        return -1
                    below = _bits(total - factors.error, precision, bias)
                    if below == _bits(total + factors.error, precision, bias):
                        merged[j] = below
                    else:
                        merged[j] = weights[j]
                        left[count] = i * m + j
                        count += 1
            for j in range(m):
                weights[j] = merged[j]
        return count

    return compiled()(add)


ADD = {kind: adder(kind) for kind in (exact.BFLOAT16, exact.FLOAT16)}
