"""Plain LoRAs into 16-bit weights on a CPU: float32 where that decides the rounding, float64 where not, else integers.

The bytes are those of `torch_sums`, which sums every delta for every dtype and device: the exact sum, rounded once.
A CPU multiplies in float32 at twice the speed, and what follows is one pass here, where torch would take many.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.fusion.cpu_kernel import ADD, UNIT, Factors, largest
from lora_fuse.fusion.cpu_product import ROWS, multiplier
from lora_fuse.lora import Delta, LowRank, NotFinite, exact

BLOCK = 1 << 19  # values of a product at a time: 2 MB
LARGE = 2.0**60  # the product of two numbers below it is far from float32's largest
SPARE = 4.0  # how far below the format's largest number a sum must be sure to stay

_memory = threading.local()


class TooLarge(Exception):
    """A sum may be too large for the format, or nearly so; nothing was changed."""


class Stacked:
    """``sum_i factor_i * a_i @ b_i``, their factors side by side: one product, whose rank is the sum of theirs.

    The error of its float32 value: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1, with
    the inequality of Cauchy and Schwarz; factors rounded to float32 count as two roundings more.
    """

    def __init__(self, parts: Sequence[LowRank], dtype: str) -> None:
        """Stack the parts that `stackable` allows, for weights of a dtype of `dtypes.SIXTEEN_BIT`."""
        self._parts = tuple(parts)
        self._kind = dtypes.SIXTEEN_BIT[dtype]
        self._dtype = dtypes.DTYPES[dtype].numpy
        self._size = sum(delta.size for delta in parts)
        self._roundings = 2 + sum(delta.roundings + 1 for delta in parts)
        factors = {delta.factor for delta in parts}
        factor = factors.pop() if len(factors) == 1 else 1.0  # of all parts; otherwise each has its own in `unscaled`
        own = [1.0 if delta.factor == factor else delta.factor for delta in parts]
        unscaled = np.concatenate([share * delta.matrix.a for share, delta in zip(own, parts, strict=True)], axis=1)
        a = factor * unscaled
        b = np.concatenate([delta.matrix.b for delta in parts if delta.matrix.b is not None], axis=0)
        rank = len(b)
        largest_factor = max(_largest(unscaled) * max(1.0, abs(factor)), _largest(b))
        self._multiply = multiplier(unscaled, b, factor)
        self._factors = Factors(
            a=a,
            b=np.ascontiguousarray(b.T),
            row_error=(np.sqrt(np.einsum("ij,ij->i", a, a)) * (1.01 * UNIT * (rank + 4))).astype(np.float32),
            column_length=np.sqrt(np.einsum("ij,ij->j", b, b)).astype(np.float32),
            lost=np.float32(2.0**-126 * (2 * rank + 2) * (1 + 2 * largest_factor) * max(1.0, abs(factor))),
            error=np.float64(0),
        )

    def add(self, weights: npt.NDArray[np.uint16], first: int) -> None:
        """Add to rows of the weight, (n, columns) as bits, in place; `first` is the number of the first.

        Raises:
            NotFinite: a weight is NaN or infinite.
            TooLarge: see there.
        """
        top = self._as_float(largest(weights))
        if not np.isfinite(top):
            raise NotFinite("the base holds NaN or infinity")
        reach = top + self._size
        if reach >= self._kind.largest / SPARE:
            raise TooLarge
        factors = self._factors._replace(error=np.float64(2.0**-52 * self._roundings * reach))
        rows = max(1, BLOCK // weights.shape[1] // ROWS) * ROWS
        for row in range(0, len(weights), rows):
            self._add(weights[row : row + rows], first + row, factors)

    def _add(self, weights: npt.NDArray[np.uint16], first: int, factors: Factors) -> None:
        tiles = -(-len(weights) // ROWS)
        product, left = _scratch((tiles * ROWS, weights.shape[1]))
        self._multiply(first, product)
        count = ADD[self._kind](weights, product, first, factors, left)
        if count < 0:
            raise RuntimeError("this machine's float32 products are coarser than IEEE 754 allows; please report it")
        for number in left[:count].tolist():
            row, column = divmod(number, weights.shape[1])
            weight = Fraction(self._as_float(weights[row, column]))
            total = sum((delta.exact(first + row, column) for delta in self._parts), weight)
            weights[row, column] = self._as_bits(exact.nearest(total, self._kind))

    def _as_float(self, bits: int | np.uint16) -> float:
        return float(np.array(bits, dtype=np.uint16).view(self._dtype))

    def _as_bits(self, value: float) -> int:
        return int(np.array(value, dtype=self._dtype).view(np.uint16))


def _scratch(shape: tuple[int, ...]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Memory of this thread's own, for a product and for the numbers of its values: fresh pages would cost time."""
    size = math.prod(shape)
    if not hasattr(_memory, "product") or len(_memory.product) < size:
        _memory.product = np.empty(size, np.float32)
        _memory.left = np.empty(size, np.int64)
    return _memory.product[:size].reshape(shape), _memory.left[:size]


def stackable(deltas: Sequence[Delta], dtype: str) -> list[LowRank] | None:
    """The same deltas, where each is a product whose sum `Stacked` can take, for weights of a dtype."""
    fit = [delta for delta in deltas if isinstance(delta, LowRank) and _is_small_product(delta)]
    return fit if dtype in dtypes.SIXTEEN_BIT and len(fit) == len(deltas) else None


def _is_small_product(delta: LowRank) -> bool:
    a = delta.matrix.a
    b = delta.matrix.b
    return b is not None and max(abs(delta.factor), 1) * _largest(a) < LARGE > _largest(b)


def _largest(values: npt.NDArray[np.float64]) -> float:
    """The largest absolute value, without memory for all of them."""
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))
