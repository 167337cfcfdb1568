"""The weights that a rounded sum may have come from: all v of a format with ``round(v + d) = c``, counted. Pure.

Rounding is monotone, so these are all numbers of the format between two bounds: half-way from c to either neighbour,
minus d. Numbers of a format are counted by their order: 0 is 0, 1 the smallest above it, -1 the one below. Where v and
c are equally coarse, that is one number; where c is the coarser one, several; where it is the finer one, one or none.

A bound is known up to the error of d in float64. Where a number of the format lies within that, the bound is settled
by sums in two float64 each, and what those leave, in fractions: so the answer is that of the exact d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.lora import DoubleDouble

Wide = npt.NDArray[np.float64]
Orders = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

FLOAT64 = dtypes.FloatFormat(53, 11)


@dataclass(frozen=True, slots=True)
class Preimages:
    """By element, the first and the last number of the format, by order, that the sum may have come from.

    `last` is below `first` where there is none; then they are the two neighbours between which it would lie.
    """

    first: Orders
    last: Orders

    @property
    def count(self) -> Orders:
        """Numbers that it may have been."""
        return self.last - self.first + 1


class Ordered:
    """The finite numbers of a format by their order."""

    def __init__(self, kind: dtypes.FloatFormat) -> None:
        """Take any format of fewer bits than float64."""
        self.kind = kind
        self._dropped = FLOAT64.precision - kind.precision
        self._least = 1 - kind.bias - (kind.precision - 1)  # exponent of the smallest number above 0
        self._offset = (FLOAT64.bias - kind.bias) << (kind.precision - 1)
        self.most = int(self._magnitude(np.array([kind.largest]))[0][0])

    def value(self, order: Orders) -> Wide:
        """The numbers; of one more than the last, what would come next."""
        size = np.abs(order)
        sizes = ((size + self._offset) << self._dropped).view(np.float64)
        small = size < (1 << (self.kind.precision - 1))
        if small.any():
            sizes[small] = size[small] * 2.0**self._least
        return np.copysign(sizes, order, out=sizes)

    def floor(self, values: Wide) -> Orders:
        """The order of the largest number that is not larger."""
        size, exact = self._magnitude(np.abs(values))
        return np.maximum(np.where(values < 0, -size - ~exact, size), -self.most - 1)

    def ceil(self, values: Wide) -> Orders:
        """The order of the smallest number that is not smaller."""
        return -self.floor(-values)

    def nearest(self, values: Wide) -> Orders:
        """The order of the nearest number, of two the one nearer to 0 or below."""
        below = self.floor(values)
        return below + (values - self.value(below) > self.value(below + 1) - values)

    def nearest_even(self, values: Wide) -> Wide:
        """The nearest numbers themselves, of two that are as near the even one; what is too large stays the last."""
        below = self.floor(values)
        middle = (self.value(below) + self.value(below + 1)) / 2
        above = (values > middle) | ((values == middle) & (below % 2 != 0))
        return self.value(np.clip(below + above, -self.most, self.most))

    def _magnitude(self, sizes: Wide) -> tuple[Orders, Flags]:
        """Rounded towards 0, and whether nothing was lost; what is too large is one more than the last."""
        limited = np.minimum(sizes, 2.0 ** (self.kind.bias + 1))
        bits = limited.view(np.int64)
        orders = (bits >> self._dropped) - self._offset
        exact = bits & ((1 << self._dropped) - 1) == 0
        small = limited < self.kind.smallest_normal
        if small.any():
            scaled = limited[small] * 2.0**-self._least
            orders[small] = scaled.astype(np.int64)
            exact[small] = orders[small] == scaled
        return orders, exact


def preimages(merged: Wide, delta: Wide, error: float, kind: dtypes.FloatFormat, exactly: Exactly) -> Preimages:
    """Find what `merged`, finite numbers of a format, may have been before `delta` was added and the sum rounded once.

    All are of one shape; `error` bounds that of each `delta`, whose exact values `exactly` has.
    """
    numbers = Ordered(kind)
    order = numbers.floor(merged)
    lowest, highest = (_half_way(numbers, order, step) for step in (-1, 1))
    zero = order == 0  # the sign of a zero says from which side: 0 itself is +0
    lowest = np.where(zero & ~np.signbit(merged), 0.0, lowest)
    highest = np.where(zero & np.signbit(merged), 0.0, highest)
    ends = []
    doubtful = np.zeros(merged.shape, np.bool_)
    for bound, is_low in ((lowest, True), (highest, False)):
        near = bound - delta
        slack = error + np.abs(near) * 2.0**-52
        found = numbers.ceil(near - slack) if is_low else numbers.floor(near + slack)
        value = numbers.value(found)
        doubtful |= value <= near + slack if is_low else value >= near - slack
        ends.append(found)
    first = np.maximum(ends[0], -numbers.most)
    last = np.minimum(ends[1], numbers.most)
    if doubtful.any():
        where = np.nonzero(doubtful)
        of_bounds = (lowest[where], highest[where])
        slack = error + (np.abs(delta[where]) + np.abs(of_bounds).max(axis=0)) * 2.0**-51
        settled = _Settled(numbers, merged[where], exactly.at(where), slack)
        first[where], last[where] = settled.ends(of_bounds, delta[where])
    return Preimages(first, last)


def _half_way(numbers: Ordered, order: Orders, step: int) -> Wide:
    """Half-way to a neighbour: float64 has it."""
    return np.asarray((numbers.value(order) + numbers.value(order + step)) / 2)


class ExactValues(Protocol):
    """The part of `Delta` that is exact."""

    def close(self, rows: Orders, columns: Orders) -> DoubleDouble:
        """See `Delta`."""

    def exact(self, row: int, column: int) -> Fraction:
        """See `Delta`."""


class KnownValues:
    """A delta that is known to its last bit, (n, columns) float64."""

    def __init__(self, values: Wide) -> None:
        self._values = values

    def close(self, rows: Orders, columns: Orders) -> DoubleDouble:
        """See `Delta`."""
        return DoubleDouble(self._values[rows, columns])

    def exact(self, row: int, column: int) -> Fraction:
        """See `Delta`."""
        return Fraction(float(self._values[row, column]))


class Exactly:
    """The exact sum of some deltas, element by element, in a part that begins at a row."""

    def __init__(self, deltas: Sequence[ExactValues], first: int) -> None:
        self._deltas = deltas
        self._first = first

    def at(self, where: tuple[Orders, ...]) -> ExactSum:
        """The sums at rows and columns of the part."""
        return ExactSum(self._deltas, where[0] + self._first, where[1])


class ExactSum:
    """Sums of deltas, (n,): in two float64 each, and where asked for in fractions."""

    def __init__(self, deltas: Sequence[ExactValues], rows: Orders, columns: Orders) -> None:
        self._deltas = deltas
        self._rows = rows
        self._columns = columns
        self._close = DoubleDouble(np.zeros(len(rows)))
        for delta in deltas:
            self._close.plus(delta.close(rows, columns))
        self._exact: dict[int, Fraction] = {}

    def side(self, weight: Wide, bound: Wide) -> Orders:
        """The sign of ``weight + sum - bound``, -1, 0 or 1."""
        total = DoubleDouble(weight.copy())
        total.add(-bound)
        found = total.plus(self._close).normal()
        sides = np.sign(found.high).astype(np.int64)
        for number in np.nonzero((np.abs(found.high) <= 2 * found.lost) & (found.lost > 0))[0].tolist():
            exact = Fraction(float(weight[number])) - Fraction(float(bound[number])) + self._fraction(number)
            sides[number] = (exact > 0) - (exact < 0)
        return sides

    def _fraction(self, number: int) -> Fraction:
        if number not in self._exact:
            place = int(self._rows[number]), int(self._columns[number])
            self._exact[number] = sum((delta.exact(*place) for delta in self._deltas), Fraction(0))
        return self._exact[number]


class _Settled:
    """The bounds of some elements, (n,), by exact sums."""

    def __init__(self, numbers: Ordered, merged: Wide, exact: ExactSum, slack: Wide) -> None:
        self._numbers = numbers
        self._even = numbers.floor(merged) % 2 == 0
        self._minus_zero = (merged == 0) & np.signbit(merged)
        self._exact = exact
        self._slack = slack

    def ends(self, bounds: tuple[Wide, Wide], delta: Wide) -> tuple[Orders, Orders]:
        """First and last order, see `Preimages`."""
        most = self._numbers.most
        lowest, highest = bounds
        first = self._search(lambda at: self._is_reached(at, lowest), lowest - delta)
        last = self._search(lambda at: self._is_passed(at, highest), highest - delta) - 1
        return np.maximum(first, -most), np.minimum(last, most)

    def _search(self, holds: Callable[[Orders], Flags], near: Wide) -> Orders:
        """The first order for which something holds that holds for all from one on; it is within the slack."""
        low = np.maximum(self._numbers.ceil(near - self._slack), -self._numbers.most) - 1  # does not hold
        high = np.minimum(self._numbers.floor(near + self._slack), self._numbers.most) + 1  # holds
        while (high - low > 1).any():
            middle = (low + high) >> 1
            found = holds(middle)
            high = np.where(found & (high - low > 1), middle, high)
            low = np.where(~found & (high - low > 1), middle, low)
        return high

    def _is_reached(self, order: Orders, lowest: Wide) -> Flags:
        """True where the sum is no further below than what rounds to the merged number."""
        side = self._exact.side(self._numbers.value(order), lowest)
        return np.asarray((side > 0) | ((side == 0) & self._even))

    def _is_passed(self, order: Orders, highest: Wide) -> Flags:
        """True where the sum is further above: of -0, what is 0 exactly, but for a zero to which nothing is added."""
        side = self._exact.side(self._numbers.value(order), highest)
        ends_in = np.where(self._minus_zero, order == 0, self._even)
        return np.asarray((side > 0) | ((side == 0) & ~ends_in))
