"""Matrices that deltas are made of: a part of one in float64, some values in two float64 each, any value exactly. Pure.

torch is imported where it computes, see `deltas`.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from lora_fuse.lora.double_double import DoubleDouble, in_range, inner_products, lowest_bits
from lora_fuse.lora.exact import inner_product

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Values = TypeVar("Values", npt.NDArray[np.float64], "torch.Tensor")


class Matrix:
    """A matrix, or the product of two: ``a`` (rows, rank) times ``b`` (rank, columns), or ``a`` alone.

    With `ordered`, its values in float64 are summed in one order, so that they are the same bits on every machine.
    """

    def __init__(self, a: Array, b: Array | None = None, *, ordered: bool = False) -> None:
        self.a = a
        self.b = b
        self.ordered = ordered
        self._on_device: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        if b is None:
            self.size = float(np.abs(a).max(initial=0))
            self.roundings = 0
        else:  # Cauchy and Schwarz
            rows, columns = (np.sqrt((m * m).sum(axis)).max(initial=0) for m, axis in ((a, 1), (b, 0)))
            self.size = float(rows * columns)
            self.roundings = len(b) + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.a.shape[0], (self.a if self.b is None else self.b).shape[1]

    def part(self, like: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """The part that begins at a row and a column and is as large as `like`, float64."""
        a, *b = self._cut(like, row, column)
        if not b:
            return a
        return ordered_product(a, b[0]) if self.ordered else a @ b[0]

    def values(self) -> Array:
        """All of it; for small ones. Summed in one order, so that the bits do not depend on the machine."""
        return self.a if self.b is None else ordered_product(self.a, self.b)

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """See `Delta`."""
        if self.b is None:
            values = DoubleDouble(self.a[rows, columns])
            return values if self._in_range else values.all_lost()
        a = self.a[rows]
        b = self.b.T[columns]
        if not self._in_range:
            return DoubleDouble(np.zeros(len(rows))).all_lost()
        row_bits, row_lengths, column_bits, column_lengths = self._grid
        largest = row_bits[rows] * column_bits[columns] * 2.0**52
        if bool((row_lengths[rows] * column_lengths[columns] < largest).all()):  # float64 has every bit of the sums
            return DoubleDouble(np.einsum("ik,ik->i", a, b))
        return inner_products(a, b)

    @cached_property
    def _in_range(self) -> bool:
        return all(in_range(side) for side in (self.a, self.b) if side is not None)

    @cached_property
    def _grid(self) -> tuple[Array, Array, Array, Array]:
        """The lowest bit of each row of `a`, and its length; and of each column of `b`."""
        sides = (self.a, (self.a if self.b is None else self.b).T)
        (of_a, length_a), (of_b, length_b) = (
            (lowest_bits(side).min(axis=1), np.sqrt((side * side).sum(axis=1))) for side in sides
        )
        return of_a, length_a, of_b, length_b

    def exact(self, row: int, column: int) -> Fraction:
        """One value without rounding."""
        if self.b is None:
            return Fraction(float(self.a[row, column]))
        return inner_product(self.a[row], self.b[:, column])

    def add_to(self, total: torch.Tensor, row: int, column: int, factor: float) -> None:
        """Add ``factor * part`` to `total`."""
        a, *b = self._cut(total, row, column)
        if self.ordered or not b:
            total.add_(self.part(total, row, column) * factor)
        else:
            total.addmm_(a, b[0], alpha=factor)

    def _cut(self, like: torch.Tensor, row: int, column: int) -> tuple[torch.Tensor, ...]:
        """The factors of a part, or the part itself, on its device."""
        import torch

        if like.device not in self._on_device:
            parts = (self.a,) if self.b is None else (self.a, self.b)
            moved = (torch.from_numpy(np.ascontiguousarray(part)).to(like.device) for part in parts)
            self._on_device[like.device] = tuple(moved)
        a, *b = self._on_device[like.device]
        rows = slice(row, row + like.shape[0])
        columns = slice(column, column + like.shape[1])
        return (a[rows], b[0][:, columns]) if b else (a[rows, columns],)


def ordered_product(a: Values, b: Values) -> Values:
    """``a @ b``, each value summed from first to last, with every product and sum rounded by itself."""
    total = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        total += a[:, k : k + 1] * b[k : k + 1]
    return total


def ordered_sum(values: torch.Tensor, dimension: int) -> torch.Tensor:
    """The sum along a dimension: halves are added until one is left, whatever order a library would take."""
    import torch

    while (count := values.shape[dimension]) > 1:
        half = count // 2
        first = values.narrow(dimension, 0, half)
        second = values.narrow(dimension, half, half)
        odd = values.narrow(dimension, 2 * half, count - 2 * half)
        values = torch.cat([first + second, odd], dimension)
    return values.squeeze(dimension)
