"""The rank of what is left of a difference, where rounding's noise is in it too. Pure.

Singular values come from a sketch (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithm
4.4: subspace iteration). A value is the difference's own where it is larger than any that the noise has: that edge
(Marchenko and Pastur 1967, for equal variances) is measured on the same numbers with signs drawn at random, which keep
each one's size and have no direction in common. What is found is taken out, and the edge measured again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

MOST = 64  # a rank that is told; what has more is called full
ITERATIONS = 2
OVER = 1.1  # times the edge: it is a random number too
INSIDE = 0.9  # of a delta's energy lies in the directions of a difference that it is a part of
LARGEST = 1 << 22  # values of a matrix that are looked at, whole rows of it


def effective_rank(matrix: Array, seed: int = 0) -> tuple[int, float]:
    """Count the singular values of a matrix (rows, columns) that noise has not; `MOST` may be more.

    Returns:
        The rank, and the mean square of what is left without it.
    """
    draw = np.random.default_rng(seed)
    most = min(MOST, *matrix.shape)
    left, sizes, right = _leading(matrix, most, draw)
    known = int((sizes > sizes[0] * 1e-5).sum()) if sizes[0] > 0 else 0
    rank = 0
    while True:
        rest = np.asarray(matrix - (left[:, :rank] * sizes[:rank]) @ right[:rank], np.float32)
        signs = draw.integers(0, 2, matrix.shape, dtype=np.int8).astype(np.float32) * 2 - 1
        edge = float(_leading(rest * signs, 1, draw)[1][0])
        found = min(known, int((sizes > OVER * edge).sum()))
        if found <= rank:
            return rank, float(np.square(rest, dtype=np.float64).mean())
        rank = found


def _leading(matrix: Array, count: int, draw: np.random.Generator) -> tuple[Array, Array, Array]:
    """The largest singular values and their vectors."""
    if min(matrix.shape) <= 2 * count + 16:
        left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], sizes[:count], right[:count]
    basis = matrix @ draw.standard_normal((matrix.shape[1], count + 16), dtype=np.float32)
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(basis)[0]
        basis = matrix @ np.linalg.qr(matrix.T @ basis)[0]
    basis = np.linalg.qr(basis)[0]
    left, sizes, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return np.asarray(basis @ left[:, :count]), sizes[:count], right[:count]


def pencil_scales(difference: Array, delta: Array, seed: int = 0) -> npt.NDArray[np.float64]:
    """The scales of a low-rank delta in a difference that has something else of low rank in it too.

    In the spaces of the difference ``D = s E + X``, of rank r(E) + r(X), the matrix ``D - s E`` is singular r(E) times
    over: s are the eigenvalues of that pencil (Golub and Van Loan, "Matrix Computations", section 7.7), all equal if
    the delta E is in D, whatever X is. None where E is not in the spaces of D.
    """
    draw = np.random.default_rng(seed)
    rank, _ = effective_rank(difference, seed)
    if not rank:
        return np.zeros(0)
    left, sizes, right = _leading(difference, rank, draw)
    inside = (left.T @ delta @ right.T).astype(np.float64)
    if np.linalg.norm(inside) ** 2 < INSIDE * float(np.square(delta, dtype=np.float64).sum()):
        return np.zeros(0)
    own = int((np.linalg.svd(inside, compute_uv=False) > 1e-2 * np.linalg.norm(inside)).sum())
    values = np.linalg.eigvals(inside / sizes.astype(np.float64)[:, None])
    values = values[np.argsort(-np.abs(values))][:own]
    real = values.real[np.abs(values.imag) < 0.1 * np.abs(values.real)]
    return np.asarray(1 / real[real != 0])
