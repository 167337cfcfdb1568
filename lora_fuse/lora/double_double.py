"""Many sums at once, in two float64 each and a bound of what those lost: hundreds of times as fast as fractions. Pure.

Factors of few bits at a round scale give sums that lie on a tie of float32, or 1e-20 beside it: one in thirty does.
The error of a sum and of a product of two float64 is a float64, which is taken along (Dekker, "A floating-point
technique for extending the available precision", 1971; Knuth, "The Art of Computer Programming", volume 2, section
4.2.2). What is lost is the error of the sum of those, and where that is 0, the sum is exact. Only operations of
IEEE 754 are used, in one order.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SPLIT = 2.0**27 + 1
SLACK = 1 + 2.0**-20  # the bound itself is a sum of rounded numbers
LARGEST = 2.0**150  # products of five numbers between these two, and their errors, are not too large nor too small
SMALLEST = 2.0**-150


class DoubleDouble:
    """Sums, each ``high + low`` but for at most ``lost``, of one shape; ``low`` is small beside ``high``."""

    def __init__(self, high: Array) -> None:
        """Begin with some numbers, none of which is lost."""
        self.high = high
        self.low = np.zeros_like(high)
        self.lost = np.zeros_like(high)

    def add(self, terms: Array) -> None:
        """Add numbers."""
        self.high, rest = _sum(self.high, terms)
        self.low, dropped = _sum(self.low, rest)
        self.lost = self.lost + np.abs(dropped)

    def add_products(self, a: Array, b: Array | float) -> None:
        """Add the products of numbers."""
        for part in _product(a, b):
            self.add(part)

    def plus(self, other: DoubleDouble) -> Self:
        """The sums with others added, in place."""
        self.add(other.high)
        self.add(other.low)
        self.lost = self.lost + other.lost
        return self

    def times(self, factor: float) -> DoubleDouble:
        """Products with a number."""
        made = DoubleDouble(np.zeros_like(self.high))
        made.add_products(self.high, factor)
        made.add_products(self.low, factor)
        made.lost = made.lost + self.lost * abs(factor) * SLACK
        return made if in_range(np.array(factor)) else made.all_lost()

    def times_sums(self, other: DoubleDouble) -> DoubleDouble:
        """Products with other sums."""
        made = DoubleDouble(np.zeros_like(self.high))
        for mine in (self.high, self.low):
            for theirs in (other.high, other.low):
                made.add_products(mine, theirs)
        sizes = [np.abs(side.high) + np.abs(side.low) + side.lost for side in (self, other)]
        made.lost = made.lost + (sizes[0] * other.lost + sizes[1] * self.lost) * SLACK
        return made

    def all_lost(self) -> Self:
        """The sums as such of which nothing is known, in place."""
        self.lost = np.full_like(self.high, np.inf)
        return self

    def normal(self) -> DoubleDouble:
        """The same with the nearest float64 of each as `high`."""
        made = DoubleDouble(self.high)
        made.high, made.low = _sum(self.high, self.low)
        made.lost = self.lost * SLACK
        return made


def inner_products(a: Array, b: Array) -> DoubleDouble:
    """``sum_k a[i, k] * b[i, k]`` for each i, of numbers in range (`in_range`)."""
    made = DoubleDouble(np.zeros(len(a)))
    for left, right in zip(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), strict=True):
        made.add_products(left, right)
    return made


def in_range(values: Array) -> bool:
    """True where a product of up to five of the values, and its error, is a float64 that is not rounded."""
    size = np.abs(values)
    return bool(((size == 0) | ((size > SMALLEST) & (size < LARGEST))).all())


def lowest_bits(values: Array) -> Array:
    """The number that the lowest bit of each value that is set stands for: a power of two; infinity for 0."""
    part, exponent = np.frexp(values)
    whole = np.ldexp(part, 53).astype(np.int64)
    return np.where(values == 0, np.inf, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _product(a: Array, b: Array | float) -> tuple[Array, Array]:
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(np.asarray(b, np.float64))
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(values: Array) -> tuple[Array, Array]:
    """Two halves of 26 bits each."""
    scaled = SPLIT * values
    high = scaled - (scaled - values)
    return high, values - high
