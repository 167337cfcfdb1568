"""The scale at which a delta is in a weight already, estimated without the weight's original. Pure.

A delta is a sum of components ``sigma_k u_k v_k^T``, its singular value decomposition. A weight W that holds it at a
scale s answers each with ``u_k^T W v_k = s sigma_k + noise``, with the same s for all: that is a matched filter
(Turin 1960, "An introduction to matched filters"). The noise is the weight's own, and it is measured in the same
directions where the delta has nothing: ``u_k^T W v_l`` for k other than l. That is the null, from the weight itself.

A trained LoRA is correlated with the base that it was trained on, so that its answers are off the null even where it is
in no weight; but they do not grow with sigma, and differ from weight to weight. So the evidence is dealt into groups,
and nothing is claimed unless each of them says about the same scale by itself; and what the answers are off by on
average widens the margin. `python -m benchmarks.claims` measures how often that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GROUPS = 8
SMALLEST = 0.2  # scale that is claimed; pocket's Lightning LoRAs, which are in no weight of their base, come to -0.1
LARGEST = 4.0  # nobody merges at more: such a delta is a part of the base's own weights
SURE = 1.5  # margins, at least, that a scale is away from 0
APART = 0.5  # of the scale, at most, that a group is off by
STUDENT = 3.5  # of a mean of 8: 99 %, two-sided, 7 degrees of freedom
WEAKEST = 1e-4  # of the largest singular value: what is below is rounding


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a weight to the components of a delta, and the singular values; both over the noise, (n,)."""

    answers: Floats
    sigmas: Floats

    @property
    def size(self) -> float:
        """The information about the scale: the inverse of its variance, of this weight alone."""
        return float(self.sigmas @ self.sigmas)


@dataclass(frozen=True, slots=True)
class ScaleEstimate:
    """A scale, half of the width of its interval of 99 %, and what the groups say, each for itself."""

    scale: float
    margin: float
    groups: tuple[float, ...]

    @property
    def smallest(self) -> float:
        """The smallest scale that would be claimed on such evidence."""
        return max(SMALLEST, SURE * self.margin)

    @property
    def is_present(self) -> bool:
        """True where the scale cannot be chance, and every group agrees."""
        agree = all(abs(group - self.scale) <= APART * self.scale for group in self.groups)
        return self.smallest <= self.scale <= LARGEST and agree


def weigh(weight: Floats, left: Floats, right: Floats) -> Answers:
    """Ask some rows of a weight for a delta ``left @ right``.

    Args:
        weight: (rows, columns).
        left: (rows, rank).
        right: (rank, columns).
    """
    own = float(np.mean(weight * weight))
    if not 0.0 < own < math.inf:  # nothing to hear, or NaN
        return Answers(np.zeros(0), np.zeros(0))
    u, sigmas, v = _components(left, right)
    crossed = u.T @ (weight @ v)  # (n, n): on the diagonal the answers, beside it the null
    answers = np.diag(crossed).copy()
    null = crossed * crossed
    np.fill_diagonal(null, 0.0)
    count = max(1, 2 * (len(sigmas) - 1))
    noise = np.sqrt(np.maximum((null.sum(axis=0) + null.sum(axis=1)) / count, own))
    return Answers(answers / noise, sigmas / noise)


def estimate(evidence: Sequence[Answers]) -> ScaleEstimate | None:
    """The scale that weights say together; None where too few say anything for an answer."""
    dealt: list[list[Answers]] = [[] for _ in range(GROUPS)]
    telling = sorted((one for one in evidence if one.size > 0), key=lambda one: -one.size)
    for number, one in enumerate(telling):  # there and back, so that all groups know about as much
        turn, place = divmod(number, GROUPS)
        dealt[GROUPS - 1 - place if turn % 2 else place].append(one)
    if not dealt[-1]:
        return None
    groups = np.array([_slope(group)[0] for group in dealt])
    scale, answers, sigmas = _slope(telling)
    left = answers - scale * sigmas
    size = float(sigmas @ sigmas)
    spread = max(float(groups.std(ddof=1)) / math.sqrt(GROUPS), math.sqrt(float(np.mean(left * left)) / size))
    trained = abs(float(left.mean())) * float(sigmas.sum()) / size  # if all answers are off by as much
    return ScaleEstimate(scale, STUDENT * spread + trained, tuple(groups.tolist()))


def _slope(evidence: Sequence[Answers]) -> tuple[float, Floats, Floats]:
    """The scale by least squares, the answers and the singular values."""
    answers = np.concatenate([one.answers for one in evidence])
    sigmas = np.concatenate([one.sigmas for one in evidence])
    return float(answers @ sigmas) / float(sigmas @ sigmas), answers, sigmas


def _components(left: Floats, right: Floats) -> tuple[Floats, Floats, Floats]:
    """The singular value decomposition of a product: (rows, n), (n,), (columns, n)."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, sigmas, v = np.linalg.svd(r_left @ r_right.T)
    n = int((sigmas > WEAKEST * sigmas.max(initial=0.0)).sum())
    return q_left @ u[:, :n], sigmas[:n], q_right @ v[:n].T
