"""The difference of a weight in two checkpoints as factors of a LoRA, and what is left of it when that is fused.

What is left is measured, not estimated: the factors as they are written are multiplied, added to the base and rounded
to its dtype as a fuse does, and compared with the checkpoint. So it counts no difference that rounding hides.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.differences import PairedTensor, RowPiece
from lora_fuse.differences.taking_out.low_rank import Decomposition, Float32, decompose, least_rank
from lora_fuse.errors import BadCheckpoint

FIRST_RANK = 16  # that is tried where a residual is asked for
DECODED = "BF16"  # that a fuse writes of a base in codes


@dataclass(frozen=True, slots=True)
class Left:
    """A weight's difference and what is left of it: sums of squares, and elements that are the checkpoint's again.

    `difference` is that of checkpoint and base, `product` that of the difference and what was extracted of it, and
    `fused` that of the checkpoint and the base with that fused into it.
    """

    difference: float
    product: float
    fused: float
    equal: int
    size: int

    @property
    def residual(self) -> float:
        """The part of the difference that is left in the end, as a share of its norm."""
        return math.sqrt(self.fused / self.difference) if self.difference else 0.0

    @property
    def before_rounding(self) -> float:
        """The same of the product alone, before it is rounded in a sum."""
        return math.sqrt(self.product / self.difference) if self.difference else 0.0


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """Up (rows, rank) and down (rank, columns) as they are written, and what is left when they are fused."""

    up: npt.NDArray[np.generic]
    down: npt.NDArray[np.generic]
    left: Left

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return len(self.down)


class Difference:
    """The difference of one weight, float32 (rows, columns), and of both checkpoints the rows it is made of."""

    def __init__(self, tensor: PairedTensor) -> None:
        """Read it; nothing is kept of a weight without a difference.

        Raises:
            BadCheckpoint: a file cannot be read, or one holds NaN or infinity in a weight that differs.
        """
        self.tensor = tensor
        self.energy = 0.0
        self._values: Float32 | None = None
        for piece in tensor.pieces():
            part = (piece.other - piece.base).astype(np.float32)
            if not part.any():
                continue
            if not np.isfinite(part).all():
                raise BadCheckpoint(f"{tensor.name!r} holds NaN or infinity, or differs by more than a float32 holds")
            if self._values is None:
                self._values = np.zeros((tensor.rows, tensor.columns), np.float32)
            self._values[piece.first : piece.first + len(part)] = part
            self.energy += _energy(part)

    @property
    def values(self) -> Float32:
        """All of it."""
        if self._values is None:
            return np.zeros((self.tensor.rows, self.tensor.columns), np.float32)
        return self._values

    @property
    def is_matrix(self) -> bool:
        """True for the weight of a module with rows and columns, as a linear layer or a convolution has it."""
        return self.tensor.name.endswith(".weight") and len(self.tensor.base.shape) > 1

    def of_rank(self, rank: int, dtype: npt.DTypeLike) -> LoraFactors:
        """The factors of a rank, or of the largest that it has, in a dtype."""
        return self._factors(decompose(self.values, rank, self._seed), rank, dtype)

    def of_residual(self, residual: float, dtype: npt.DTypeLike) -> LoraFactors | None:
        """The factors of the least rank by which no more is left than `residual`, in a dtype.

        None where the factors would have more numbers than the difference itself.
        """
        rows, columns = self.values.shape
        most = rows * columns // (rows + columns)
        rank = min(FIRST_RANK, most)
        while rank:
            found = decompose(self.values, rank, self._seed)
            made = self._factors(found, found.rank, dtype)
            if made.left.residual <= residual:
                return self._least(found, made, residual, dtype)
            hopeless = made.left.residual > made.left.before_rounding  # then rounding hides nothing that would count
            if rank == most or (hopeless and least_rank(found, self.energy, residual**2) > most):
                return None
            rank = min(2 * rank, most)
        return None

    def whole(self) -> Left:
        """All of it, to float32."""
        return self._measured(lambda piece: self.values[piece.first : piece.first + len(piece.base)])

    def nothing(self) -> Left:
        """None of it."""
        return Left(self.energy, self.energy, self.energy, 0, self.tensor.size)

    @property
    def _seed(self) -> int:
        return zlib.crc32(self.tensor.name.encode())

    def _least(self, found: Decomposition, made: LoraFactors, residual: float, dtype: npt.DTypeLike) -> LoraFactors:
        """The factors of the least rank of those that were found."""
        low = 0
        while made.rank - low > 1:
            middle = (low + made.rank) // 2
            tried = self._factors(found, middle, dtype)
            if tried.left.residual <= residual:
                made = tried
            else:
                low = middle
        return made

    def _factors(self, found: Decomposition, rank: int, dtype: npt.DTypeLike) -> LoraFactors:
        up, down = (side.astype(dtype) for side in found.factors(rank))
        wide = up.astype(np.float32), down.astype(np.float32)
        left = self._measured(lambda piece: wide[0][piece.first : piece.first + len(piece.base)] @ wide[1])
        return LoraFactors(up, down, left)

    def _measured(self, product: Callable[[RowPiece], Float32]) -> Left:
        dtype = dtypes.DTYPES[self.tensor.base.dtype or DECODED].numpy
        sums = np.zeros(2)
        equal = 0
        for piece in self.tensor.pieces():
            made = product(piece)
            off = (piece.other - piece.base).astype(np.float32) - made
            with np.errstate(over="ignore"):
                fused = (piece.base + made).astype(dtype).astype(piece.other.dtype)
            gone = fused - piece.other
            sums += [_energy(off), _energy(gone)]
            equal += int((gone == 0).sum())
        return Left(self.energy, float(sums[0]), float(sums[1]), equal, self.tensor.size)


def _energy(values: npt.NDArray[np.floating]) -> float:
    """The sum of squares, in float64."""
    return float(np.square(values, dtype=np.float64).sum())
