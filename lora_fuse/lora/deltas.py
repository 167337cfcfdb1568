"""The arithmetic of a delta: factors in, rows of it out, in float64; and any one value exactly. Pure.

torch is imported where it computes: its import takes seconds, and plain LoRAs in 16 bits do without it.

`make_delta` builds the delta of an algorithm of `key_formats`. A row of the weight is an output feature; the other
dimensions of a convolution are flattened behind it. Each formula is multiplied by the file's own factor and the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_fuse.lora.double_double import DoubleDouble
from lora_fuse.lora.key_formats import Algorithm
from lora_fuse.lora.matrices import Array, Indices, Matrix, ordered_product, ordered_sum

if TYPE_CHECKING:
    import torch

    from lora_fuse.models import name_maps

Tensors = Mapping[str, Array]


class NotFinite(ValueError):
    """A weight holds NaN or infinity, or would after the sum."""


class Delta(Protocol):
    """A matrix that is added to a weight.

    `size` bounds the sum of the absolute values that any element is a sum of, `roundings` the roundings that a float64
    evaluation makes on the way; together they bound its error. `size` is infinite where the formula has a root in it.
    """

    size: float
    roundings: int

    def add_to(self, total: torch.Tensor, weight: torch.Tensor, row: int, column: int, /) -> None:
        """Add to `total`, (n, m) float64, the part that begins at a row and a column; `weight` is the base's part."""

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """Values by row and column, (n,), with a bound of their error; not where `size` is infinite."""

    def exact(self, row: int, column: int) -> Fraction:
        """One value without any rounding; not where `size` is infinite."""


class LowRank:
    """``factor * matrix``: LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1), or a whole delta."""

    def __init__(self, matrix: Matrix, factor: float) -> None:
        self.matrix = matrix
        self.factor = factor
        self.size = abs(factor) * matrix.size
        self.roundings = matrix.roundings + 2

    def add_to(self, total: torch.Tensor, _: torch.Tensor, row: int, column: int) -> None:
        """See `Delta`."""
        self.matrix.add_to(total, row, column, self.factor)

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """See `Delta`."""
        return self.matrix.close(rows, columns).times(self.factor)

    def exact(self, row: int, column: int) -> Fraction:
        """See `Delta`."""
        return Fraction(self.factor) * self.matrix.exact(row, column)


class _OfTwo:
    """A delta of two matrices and a factor."""

    def __init__(self, left: Matrix, right: Matrix, factor: float) -> None:
        self.left = left
        self.right = right
        self.factor = factor
        self.size = abs(factor) * left.size * right.size
        self.roundings = left.roundings + right.roundings + 3


class Hadamard(_OfTwo):
    """``factor * left * right``, element by element: LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098, section 2.2)."""

    def add_to(self, total: torch.Tensor, _: torch.Tensor, row: int, column: int) -> None:
        """See `Delta`."""
        total.add_((self.left.part(total, row, column) * self.right.part(total, row, column)).mul_(self.factor))

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """See `Delta`."""
        left, right = (side.close(rows, columns) for side in (self.left, self.right))
        return left.times_sums(right).times(self.factor)

    def exact(self, row: int, column: int) -> Fraction:
        """See `Delta`."""
        return Fraction(self.factor) * self.left.exact(row, column) * self.right.exact(row, column)


class Kronecker(_OfTwo):
    """``factor * left (x) right``: LoKr (Yeh et al. 2023, arXiv:2309.14859, section 3.2)."""

    @cached_property
    def _values(self) -> tuple[Array, Array]:
        return np.ascontiguousarray(self.left.values()), np.ascontiguousarray(self.right.values())

    def add_to(self, total: torch.Tensor, _: torch.Tensor, row: int, column: int) -> None:
        """See `Delta`."""
        import torch

        left, right = (torch.from_numpy(values).to(total.device) for values in self._values)
        rows = torch.arange(row, row + total.shape[0], device=total.device).unsqueeze(1)
        columns = torch.arange(column, column + total.shape[1], device=total.device)
        height, width = right.shape
        product = left[rows // height, columns // width] * right[rows % height, columns % width]
        total.add_(product.mul_(self.factor))

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """See `Delta`."""
        height, width = self.right.shape
        left = self.left.close(rows // height, columns // width)
        return left.times_sums(self.right.close(rows % height, columns % width)).times(self.factor)

    def exact(self, row: int, column: int) -> Fraction:
        """See `Delta`."""
        rows, columns = self.right.shape
        left = self.left.exact(row // rows, column // columns)
        return Fraction(self.factor) * left * self.right.exact(row % rows, column % columns)


class Decomposed:
    """DoRA: each row, or column, of base + delta is given a length of its own.

    Source: Liu et al. 2024, arXiv:2402.09353, section 4.1. As PEFT writes it (`lora_magnitude_vector`), the scale is
    inside: ``m * (W + s D) / |W + s D|``, peft/tuners/lora/dora.py. As LyCORIS writes it (`dora_scale`), it is outside:
    ``W + s * (m * (W + D) / |W + D| - W)``, lycoris/functional/general.py and ComfyUI's weight_decompose.

    A row whose magnitude is NaN is none of the delta's. A root cannot be summed exactly. It is in float64, in one order
    of single operations: the same on every machine.
    """

    def __init__(self, inner: Delta, magnitude: Array, scale: float, by_column: bool) -> None:
        self.inner = inner
        self.scale = scale
        self.by_column = by_column
        self.magnitude = np.ascontiguousarray(magnitude.reshape(-1))
        self.size = math.inf
        self.roundings = 0
        self.lengths: torch.Tensor | None = None  # of columns: `measure` fills it

    def measure(self, weight: torch.Tensor, first: int) -> None:
        """Take in some rows of the base, in order: the lengths of columns are known when all have been seen."""
        squares = ordered_sum(self._moved(weight, first, 0).square(), 0)
        self.lengths = squares if self.lengths is None else self.lengths + squares

    def add_to(self, total: torch.Tensor, weight: torch.Tensor, row: int, column: int) -> None:
        """See `Delta`; for whole rows only, and by column, `measure` comes first."""
        import torch

        moved = self._moved(weight, row, column)
        magnitude = torch.from_numpy(self.magnitude)
        if self.by_column:
            if self.lengths is None:
                raise RuntimeError("measure() comes first")
            repeat = weight.shape[1] // len(magnitude)
            lengths = ordered_sum(self.lengths.view(-1, repeat), 1).sqrt()
            moved *= (magnitude / lengths).repeat_interleave(repeat)
        else:
            lengths = ordered_sum(moved.square(), 1).sqrt()
            own = magnitude[row : row + len(total)]
            moved *= (own / lengths).unsqueeze(1)
            moved[own.isnan()] = weight[own.isnan()]
        total.add_(moved.sub_(weight).mul_(self.scale))

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """Not possible, as `exact`."""
        raise NotImplementedError

    def exact(self, row: int, column: int) -> Fraction:
        """Not possible: the formula has a root in it."""
        raise NotImplementedError

    def _moved(self, weight: torch.Tensor, row: int, column: int) -> torch.Tensor:
        moved = weight.clone()
        self.inner.add_to(moved, weight, row, column)
        return moved


class Replacement:
    """Values in the place of the base's: ``V - W``, added to nothing but W, so that the sum is V to its last bit.

    Source: `set_weight` of ComfyUI, comfy/lora.py and comfy/weight_adapter.
    """

    def __init__(self, values: Matrix) -> None:
        self._values = values
        self.size = math.inf
        self.roundings = 0

    def add_to(self, total: torch.Tensor, weight: torch.Tensor, row: int, column: int) -> None:
        """See `Delta`."""
        self._values.add_to(total.sub_(weight), row, column, 1.0)

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """Not possible, as `exact`."""
        raise NotImplementedError

    def exact(self, row: int, column: int) -> Fraction:
        """Not possible without the base's value."""
        raise NotImplementedError


def make_delta(algorithm: Algorithm, tensors: Tensors, factor: float, scale: float) -> Delta:
    """Build the delta of tensors, float64 by role; `factor` is made of alpha and rank, `scale` is the user's."""
    if "magnitude" in tensors:
        inner = _plain(algorithm, tensors, factor * scale, ordered=True)
        return Decomposed(inner, tensors["magnitude"], 1.0, by_column=False)
    if "dora_scale" in tensors:
        by_column = is_by_column(tensors["dora_scale"].shape)
        inner = _plain(algorithm, tensors, factor, ordered=True)
        return Decomposed(inner, tensors["dora_scale"], scale, by_column)
    return _plain(algorithm, tensors, factor * scale)


def is_by_column(shape: Sequence[int]) -> bool:
    """True for lengths of columns, by the shape of LyCORIS' ``dora_scale``: (1, columns)."""
    return shape[:1] == (1,) and math.prod(shape) > 1


class MovedRows:
    """A delta whose rows lie elsewhere: some are left out, or others between them, in which nothing is added."""

    def __init__(self, inner: Delta, runs: Sequence[name_maps.RowRun], index: Indices) -> None:
        """Take runs of rows, and by row of the whole the delta's own, or -1."""
        self._inner = inner
        self._runs = runs
        self._index = index
        self.size = inner.size
        self.roundings = inner.roundings

    def add_to(self, total: torch.Tensor, weight: torch.Tensor, row: int, column: int) -> None:
        """See `Delta`."""
        for run in self._runs:
            first = max(row, run.start)
            end = min(row + len(total), run.start + run.rows)
            if first < end:
                part = slice(first - row, end - row)
                self._inner.add_to(total[part], weight[part], run.source + first - run.start, column)

    def close(self, rows: Indices, columns: Indices) -> DoubleDouble:
        """See `Delta`."""
        own = self._index[rows]
        values = self._inner.close(np.maximum(own, 0), columns)
        for part in (values.high, values.low, values.lost):
            part[own < 0] = 0
        return values

    def exact(self, row: int, column: int) -> Fraction:
        """See `Delta`."""
        own = int(self._index[row])
        return Fraction(0) if own < 0 else self._inner.exact(own, column)


def rows_of(delta: Delta, runs: Sequence[name_maps.RowRun], rows: int) -> Delta:
    """A delta as one of a parameter of so many rows, of which only `runs` are its own; what is low rank stays so."""
    index = np.full(rows, -1, np.int64)
    for run in runs:
        index[run.start : run.start + run.rows] = np.arange(run.source, run.source + run.rows)

    def moved(matrix: Matrix) -> Matrix:
        return Matrix(_picked(matrix.a, index, 0.0), matrix.b, ordered=matrix.ordered)

    match delta:
        case LowRank():
            return LowRank(moved(delta.matrix), delta.factor)
        case Hadamard():
            return Hadamard(moved(delta.left), moved(delta.right), delta.factor)
        case Decomposed():
            lengths = np.resize(delta.magnitude, max(len(delta.magnitude), int(index.max()) + 1))  # one may be for all
            inner = rows_of(delta.inner, runs, rows)
            return Decomposed(inner, _picked(lengths, index, math.nan), delta.scale, by_column=False)
        case _:
            return MovedRows(delta, runs, index)


def _picked(values: Array, index: Indices, other: float) -> Array:
    """Rows by their numbers, and for -1 rows of another number."""
    picked = values[np.maximum(index, 0)]
    picked[index < 0] = other
    return picked


def _plain(algorithm: Algorithm, tensors: Tensors, factor: float, *, ordered: bool = False) -> Delta:
    match algorithm:
        case Algorithm.LORA if "up bias" in tensors:
            return LowRank(Matrix(tensors["up bias"].reshape(-1, 1), np.ones((1, 1)), ordered=ordered), factor)
        case Algorithm.LORA:
            up = _flat(tensors["up"])
            down = tensors["down"]
            if "mid" in tensors:  # Tucker: the kernel between the two, lycoris/modules/locon.py
                down = _with_core(tensors["mid"], _flat(down))
            return LowRank(Matrix(up, _flat(down), ordered=ordered), factor)
        case Algorithm.LOHA:
            return Hadamard(_side(tensors, 1, ordered=ordered), _side(tensors, 2, ordered=ordered), factor)
        case Algorithm.LOKR:
            return Kronecker(_side(tensors, 1), _side(tensors, 2), factor)
        case Algorithm.FULL:
            return LowRank(Matrix(_flat(tensors["diff"]), ordered=ordered), factor)
        case Algorithm.SET:
            return Replacement(Matrix(_flat(tensors["diff"])))


def _side(tensors: Tensors, n: int, *, ordered: bool = False) -> Matrix:
    """One of the two matrices of LoHa or LoKr; with a Tucker core ``t[i, j] * a[i] * b[j]`` (lycoris, tucker)."""
    if f"w{n}" in tensors:
        return Matrix(_flat(tensors[f"w{n}"]))
    a = tensors[f"w{n}_a"]
    b = tensors[f"w{n}_b"]
    if f"t{n}" in tensors:
        a = a.T
        b = _with_core(tensors[f"t{n}"], b)
    return Matrix(np.ascontiguousarray(a), _flat(b), ordered=ordered)


def _with_core(core: Array, b: Array) -> Array:
    """``ij...,jr->ir...``: a Tucker core and the matrix behind it."""
    made = ordered_product(np.moveaxis(core, 1, -1).reshape(-1, core.shape[1]), b)
    return np.moveaxis(made.reshape(core.shape[0], *core.shape[2:], b.shape[1]), -1, 1)


def _flat(values: Array) -> Array:
    """A matrix: what comes behind the first dimension in one."""
    return values.reshape(len(values), -1)
