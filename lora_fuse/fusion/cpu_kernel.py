"""The inner loop of `cpu_adder`, compiled for the machine by numba: one pass over a product instead of ten. Pure.

Exactness is decided here. Let ``w`` be a weight, ``d`` its exact delta and ``p`` the float32 product for it. Then
``near = fl(w + p)`` is at most `error_bound` away from ``w + d``, so that this lies between ``low``, `near` less the
bound, and ``high``, `near` plus it. Rounding is monotone: where both ends round to the same number of 16 bits, that
number is ``w + d`` rounded once. Where they do not, float64 decides in the same way, by its own and much smaller bound
(`Factors.error`); what is undecided even then is left to the caller, who sums in fractions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.quantisation import compiled

UNIT = 2.0**-24  # half a unit in the last place of float32, relative

# numba widens what is not converted
F32 = np.float32
U16 = np.uint16
U32 = np.uint32
U64 = np.uint64
Bits: TypeAlias = npt.NDArray[np.uint16]
Float32s: TypeAlias = npt.NDArray[np.float32]


class Factors(NamedTuple):
    """The two factors of a delta: a row of each makes a value; and the bounds of the error of their products."""

    a: npt.NDArray[np.float64]  # (rows, rank)
    b: npt.NDArray[np.float64]  # (columns, rank): transposed
    row_error: npt.NDArray[np.float32]  # (rows,)
    column_length: npt.NDArray[np.float32]  # (columns,): times the row's error it is the error of a float32 value
    lost: np.float32  # and this, to numbers too small for float32
    error: np.float64  # of a float64 sum


@compiled()
def largest(bits: npt.NDArray[np.uint16]) -> np.uint16:
    """The largest absolute value in some rows, as its bits."""
    top = U16(0)
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            top = max(top, U16(bits[i, j] & U16(0x7FFF)))
    return top


@compiled()
def weight_of(bits: np.uint16, dropped: np.uint32, scale: np.float32) -> np.float32:
    """A 16-bit weight in float32, exactly: its bits at float32's places, its exponent by float32's bias."""
    magnitude = U32(U32(bits & U16(0x7FFF)) << dropped)
    sign = U32(U32(bits & U16(0x8000)) << U32(16))
    return F32(U32(magnitude | sign).view(F32) * scale)


@compiled()
def error_bound(near: np.float32, row_error: np.float32, column_length: np.float32, lost: np.float32) -> np.float32:
    """The largest distance of ``near = fl(w + p)`` from ``w + d``.

    Of the product it is ``|p - d| <= row_error * column_length + lost`` (Higham, see `Stacked`). Four units of roundoff
    of `near` are left for the sum, for the two ends of the interval and for the arithmetic in here.
    """
    of_product = F32(row_error * column_length)
    of_sum = F32(abs(near) * F32(4 * UNIT))
    return F32(of_product + F32(of_sum + lost))


@compiled()
def nearest_even(end: np.float32, dropped: np.uint32) -> np.uint32:
    """Round an end of the interval to 16 bits, to nearest, ties to even; the sign stays above what is left."""
    bits = F32(end).view(U32)
    below_half = U32(U32(U32(1) << U32(dropped - U32(1))) - U32(1))
    odd = U32(U32(bits >> dropped) & U32(1))
    return U32(U32(U32(bits + below_half) + odd) >> dropped)


@compiled()
def nearest_even_of_float64(value: np.float64, precision: int, bias: int) -> np.uint16:
    """Round a float64 that is not too large to the bits of a 16-bit format, to nearest, ties to even."""
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


# Overwrites weights, (n, m), by their sum with a product, rounded once, as far as float64 decides it. The arguments are
# the weights' bits; their part of ``a @ b.T`` in float32, (n, m); the row of `Factors.a` that belongs to the first of
# them; the factors of the whole product; and memory for n * m numbers, which is given the flat ones of the weights that
# stay as they were, undecided. Returns their count; or -1 where a product is further off than float32 allows.
AddRows: TypeAlias = Callable[[Bits, Float32s, int, Factors, npt.NDArray[np.int64]], int]


def adder(kind: dtypes.FloatFormat) -> AddRows:
    """Compile the loop for one format of 16 bits: with its constants in it, it is twice as fast as with variables.

    An example in bfloat16, whose numbers around 1 are 1, 1 + 2**-7, 1 + 2**-6. The weight is 1, the rank 1, the
    bound 4 units of roundoff, 2.4e-7:

    - ``d = 2**-3 * 2**-3``: `near` is 1 + 2**-6. Both ends round to 1 + 2**-6, which is the result.
    - ``d = 2**-4 * (2**-4 + 2**-26)``: `near` is 1 + 2**-8, half-way between 1 and 1 + 2**-7, as float32 has no room
      for the 2**-30. `low` rounds to 1, `high` to 1 + 2**-7: undecided. Both ends of float64's interval, which has the
      2**-30 and a bound below 2**-49, round to 1 + 2**-7: that is the result.
    - ``d = 2**-4 * 2**-4``: the sum is half-way exactly. float64 is undecided too; fractions say 1, which is even.
    """
    dropped = U32(dtypes.FLOAT32.precision - kind.precision)
    scale = F32(2.0 ** (dtypes.FLOAT32.bias - kind.bias))
    back = F32(1 / scale)
    smallest = F32(kind.smallest_normal)
    same_exponents = kind.bias == dtypes.FLOAT32.bias  # as float32: no number is too small for `nearest_even`
    precision = kind.precision
    bias = kind.bias

    def add(bits: Bits, product: Float32s, first: int, factors: Factors, left: npt.NDArray[np.int64]) -> int:
        n, m = bits.shape
        merged = np.empty(m, U16)
        undecided = np.zeros((m + 3) // 4 * 4, U16)
        four_undecided = undecided.view(U64)  # they are few: four at a time
        column_length = factors.column_length
        count = 0
        for i in range(n):
            weights = bits[i]
            added = product[i]
            row_error = factors.row_error[first + i]
            for j in range(m):
                near = F32(weight_of(weights[j], dropped, scale) + added[j])
                bound = error_bound(near, row_error, column_length[j], factors.lost)
                low = F32(F32(near - bound) * back)
                below = nearest_even(low, dropped)
                differ = U32(below ^ nearest_even(F32(F32(near + bound) * back), dropped))
                undecided[j] = U16(differ) if same_exponents else U16(differ | U32(abs(near) < smallest))
                merged[j] = U16(U32(below & U32(0x7FFF)) | U32(U32(low.view(U32) >> U32(16)) & U32(0x8000)))
            for k in range(four_undecided.shape[0]):
                if four_undecided[k] == 0:
                    continue
                for j in range(4 * k, min(4 * k + 4, m)):
                    if undecided[j] == 0:
                        continue
                    weight = weight_of(weights[j], dropped, scale)
                    total = np.float64(weight) + _inner_product(factors.a[first + i], factors.b[j])
                    near = F32(weight + added[j])
                    if not abs(total - near) <= error_bound(near, row_error, column_length[j], factors.lost):
                        return -1
                    merged[j] = nearest_even_of_float64(total - factors.error, precision, bias)
                    if merged[j] != nearest_even_of_float64(total + factors.error, precision, bias):
                        merged[j] = weights[j]
                        left[count] = i * m + j
                        count += 1
            for j in range(m):  # numba's assignment of a slice takes several times as long
                weights[j] = merged[j]
        return count

    return compiled()(add)


ADD = {kind: adder(kind) for kind in dtypes.SIXTEEN_BIT.values()}
