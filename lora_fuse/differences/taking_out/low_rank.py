"""A matrix as the product of two that are small, as near to it as a rank allows. Pure.

Small ones by the singular value decomposition. Of larger ones, the space of their largest singular vectors is found by
products with a few random vectors (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1): with
`MORE` vectors than the rank and two steps of power iteration, what is left is within a hundredth of the least that is
possible, even where singular values hardly fall (theorem 10.7 and section 10.4). Nothing relies on that: whoever uses
the product measures what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

SMALL = 384  # rows or columns of a matrix that is decomposed as a whole
MORE = 16  # random vectors beyond the rank
STEPS = 2  # of power iteration, each two products with the matrix


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The first singular values of a matrix, largest first, and their vectors: ``left * values @ right``.

    `left` is (rows, n), `values` (n,) and `right` (n, columns), float32.
    """

    left: Float32
    values: Float32
    right: Float32

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return len(self.values)

    def factors(self, rank: int) -> tuple[Float32, Float32]:
        """Up (rows, rank) and down (rank, columns), of one size, whose product is nearest to the matrix."""
        roots = np.sqrt(self.values[:rank])
        return np.ascontiguousarray(self.left[:, :rank] * roots), roots[:, np.newaxis] * self.right[:rank]


def decompose(matrix: Float32, rank: int, seed: int) -> Decomposition:
    """The first `rank` singular values of a matrix, (rows, columns), or all that it has; `seed` draws the vectors."""
    if min(matrix.shape) <= max(SMALL, rank + MORE):
        whole = _whole(matrix)
        return Decomposition(whole.left[:, :rank], whole.values[:rank], whole.right[:rank])
    basis = _basis(matrix, rank + MORE, seed)
    small = basis.T @ matrix
    left, values, right = np.linalg.svd(small, full_matrices=False)
    return Decomposition(basis @ left[:, :rank], values[:rank], right[:rank])


def _whole(matrix: Float32) -> Decomposition:
    """All singular values, by the eigenvalues of the smaller Gram matrix in float64, whose error is below float32's."""
    if matrix.shape[0] > matrix.shape[1]:
        turned = _whole(np.ascontiguousarray(matrix.T))
        return Decomposition(np.ascontiguousarray(turned.right.T), turned.values, np.ascontiguousarray(turned.left.T))
    if max(matrix.shape) <= SMALL:
        left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return Decomposition(left.astype(np.float32), values.astype(np.float32), right.astype(np.float32))
    wide = matrix.astype(np.float64)
    energies, vectors = np.linalg.eigh(wide @ wide.T)
    values = np.sqrt(np.maximum(energies[::-1], 0.0))
    left = vectors[:, ::-1]
    right = left.T @ wide / np.maximum(values, np.finfo(np.float64).tiny)[:, np.newaxis]
    right[values <= values[0] * 2.0**-24] = 0.0
    return Decomposition(left.astype(np.float32), values.astype(np.float32), right.astype(np.float32))


def _basis(matrix: Float32, count: int, seed: int) -> Float32:
    """An orthonormal basis, (rows, count), of about the space of the largest left singular vectors."""
    drawn = np.random.default_rng(seed).standard_normal((matrix.shape[1], count), dtype=np.float32)
    basis, _ = np.linalg.qr(matrix @ drawn)
    for _ in range(STEPS):
        back, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ back)
    return np.asarray(basis, np.float32)


def least_rank(decomposition: Decomposition, energy: float, left: float) -> int:
    """The rank that is needed at least so that no more than `left` of the energy, a sum of squares, is left.

    Singular values that are not known are at most the last that is.
    """
    kept = np.cumsum(np.square(decomposition.values.astype(np.float64)))
    enough = np.flatnonzero(energy - kept <= left * energy)
    if len(enough):
        return int(enough[0]) + 1
    last = float(decomposition.values[-1]) ** 2
    if not last:
        return decomposition.rank
    return decomposition.rank + math.ceil((energy - float(kept[-1]) - left * energy) / last)
