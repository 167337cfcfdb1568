"""One weight after another, whole or some rows: what differs from the base, and what LoRAs leave of the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import blocks, dtypes
from lora_fuse.differences import PairedTensor, RowPiece
from lora_fuse.differences.explaining.estimation import CLEAN
from lora_fuse.differences.explaining.float_rounding import FORMATS, rounded, spacing
from lora_fuse.differences.explaining.merge_ways import Summands
from lora_fuse.differences.explaining.remainder import LARGEST, effective_rank
from lora_fuse.differences.explaining.samples import OpenedDeltas, TargetedTensor, drawn
from lora_fuse.differences.explaining.way_search import FITS, FITS_FLOAT32, Recognised

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

AT_ONCE = 1 << 16  # values that are worked on at once: what comes of them stays in a core's cache


@dataclass(frozen=True, slots=True)
class ExaminedTensor:
    """A weight: how many of its `values` differ from the base's, rounded, and the norms of both and of the difference.

    `left` is the norm of what LoRAs leave of the difference, `noise` that which rounding may leave; `missed` of `moved`
    values do not come out. `dot` is the product of both weights.
    """

    name: str
    shape: tuple[int, ...]
    values: int
    differing: int
    base_norm: float
    other_norm: float
    difference_norm: float
    left: float
    noise: float
    dot: float
    moved: int
    missed: int
    is_target: bool
    explained: bool

    @property
    def block(self) -> str:
        """The block that it is in."""
        return blocks.block_of(self.name)

    @property
    def is_matrix(self) -> bool:
        """True of two dimensions or more."""
        return len(self.shape) > 1 and min(self.shape[0], math.prod(self.shape[1:])) > 1

    @property
    def relative(self) -> float:
        """The norm of the difference over that of the base."""
        return self.difference_norm / self.base_norm if self.base_norm else float(self.difference_norm > 0)


@dataclass(frozen=True, slots=True)
class LeftInBlock:
    """The remainder of a block, of the weight that has most of it: `rank` None where that is no matrix.

    `full` is True where what is left has no few directions.
    """

    block: str
    name: str
    rank: int | None
    full: bool


class Examiner:
    """A comparison of weights with what LoRAs at some scales, in a way or in none that is known, would have made."""

    def __init__(self, found: Recognised | None, scales: Sequence[float], rows: int | None) -> None:
        """Take what was found; `rows` are looked at of each weight, None for all."""
        self._found = found
        self._scales = scales
        self._rows = rows

    def examine(
        self, tensor: PairedTensor, targeted: TargetedTensor | None, advance: Callable[[int], None]
    ) -> ExaminedTensor:
        """Read a weight in both checkpoints.

        Raises:
            BadCheckpoint, BadLora: a file cannot be read.
        """
        kind = FORMATS.get(tensor.dtype or "")
        opened = OpenedDeltas(targeted, len(self._scales)) if targeted and any(self._scales) else None
        sums = np.zeros(10)
        for piece in self._pieces(tensor):
            for part in piece.in_parts(AT_ONCE):
                sums += self._measured(part, tensor, kind, opened)
            advance(piece.other.nbytes)
        values, differing, moved, missed = (int(one) for one in sums[:4])
        base, other, difference, left, noise = (math.sqrt(one) for one in sums[4:9])
        needed = FITS_FLOAT32 if tensor.dtype == "F32" else FITS
        fits = missed <= (1 - needed) * moved if self._found and kind else left**2 <= CLEAN * noise**2
        return ExaminedTensor(
            name=tensor.name,
            shape=tensor.base.shape,
            values=values,
            differing=differing,
            base_norm=base,
            other_norm=other,
            difference_norm=difference,
            left=left,
            noise=noise,
            dot=float(sums[9]),
            moved=moved,
            missed=missed,
            is_target=targeted is not None,
            explained=not differing or (opened is not None and fits),
        )

    def left_of(self, tensor: PairedTensor, targeted: TargetedTensor | None) -> LeftInBlock:
        """Estimate the rank of what is left of a weight's difference, of at most `LARGEST` values.

        Raises:
            BadCheckpoint, BadLora: a file cannot be read.
        """
        block = blocks.block_of(tensor.name)
        if min(tensor.rows, tensor.columns) < 2:
            return LeftInBlock(block, tensor.name, None, full=False)
        rest, noise = self.rest(tensor, targeted, self._scales)
        rank, left = effective_rank(rest)
        return LeftInBlock(block, tensor.name, rank, left > CLEAN * noise)

    def rest(
        self, tensor: PairedTensor, targeted: TargetedTensor | None, scales: Sequence[float]
    ) -> tuple[npt.NDArray[np.float32], float]:
        """Rows of the difference without LoRAs at some scales, and the variance of rounding there."""
        kind = FORMATS.get(tensor.dtype or "")
        rows = drawn(tensor, max(2, LARGEST // tensor.columns))
        piece = tensor.read(rows)
        opened = OpenedDeltas(targeted, len(scales)) if targeted and any(scales) else None
        values = piece.other.astype(np.float64)
        total = piece.base.astype(np.float64)
        if opened is not None:
            total = opened.summands(piece, rows, coarse=False).total(scales)
        return (values - total).astype(np.float32), float(_variance(total, values, kind).mean())

    def _pieces(self, tensor: PairedTensor) -> Iterator[RowPiece]:
        if self._rows is None or self._rows >= tensor.rows:
            yield from tensor.pieces()
            return
        rows = drawn(tensor, self._rows)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            yield tensor.read(run)

    def _measured(
        self, piece: RowPiece, tensor: PairedTensor, kind: dtypes.FloatFormat | None, opened: OpenedDeltas | None
    ) -> Array:
        """The sums of one piece, in the order of `examine`."""
        base = piece.base.astype(np.float64)
        energy = float((base * base).sum())
        if opened is None and np.array_equal(piece.base, piece.other):
            return np.array([base.size, 0, 0, 0, energy, energy, 0, 0, 0, energy])
        other = piece.other.astype(np.float64)
        start = base if kind is None or tensor.base.dtype == tensor.dtype else rounded(base, kind)
        summands = Summands(base, [], [])
        if opened is not None:
            coarse = self._found is not None and self._found.way.is_coarse
            summands = opened.summands(piece, coarse=coarse)
        total = summands.total(self._scales[: len(summands.deltas)])
        expected, missed = self._held(summands, total, other, kind, known=opened is not None)
        rest = other - (expected if self._found is not None else total)
        difference = other - base
        moved = (other != start) | (expected != start)
        counts = [base.size, (other != start).sum(), moved.sum(), missed]
        noise = _variance(total, other, kind)
        norms = [energy, (other * other).sum(), (difference * difference).sum(), (rest * rest).sum(), noise.sum()]
        return np.array([*counts, *norms, (base * other).sum()], np.float64)

    def _held(
        self, summands: Summands, total: Array, values: Array, kind: dtypes.FloatFormat | None, *, known: bool
    ) -> tuple[Array, int]:
        """The values to expect, and how many are others."""
        if kind is None:
            return total, 0
        if self._found is None or not known:
            expected = rounded(total, kind)
            return expected, int((expected != values).sum())
        expected = self._found.expected(summands, kind)
        if np.array_equal(expected, values):  # as nearly always
            return expected, 0
        return expected, int((~self._found.comes_out(summands, kind, values)).sum())


def _variance(total: Array, values: Array, kind: dtypes.FloatFormat | None) -> Array:
    """The variance of rounding by value; none is known of codes."""
    if kind is None:
        return np.zeros_like(total)
    return np.asarray(np.maximum(spacing(total, kind), spacing(values, kind)) ** 2 / 12)
