"""The scales at which LoRAs are in a checkpoint, of sampled rows: joint least squares, and rounding worked out. Pure.

With D the difference of both checkpoints and D_i the delta of a LoRA at scale 1, ``D = sum_i s_i D_i`` but for
rounding. Least squares alone are wrong where a delta is smaller than the distance of two numbers: base and result lie
on one grid, and most weights do not move. So the rounding is worked out: each value in the checkpoint says between
which two scales it is what comes out, and the scale is the one that most of them allow. Error bars are those of least
squares with an error of each value that is uniform between the middles to its neighbours: unit**2 / 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.differences.explaining.float_rounding import intervals, rounded, spacing
from lora_fuse.differences.explaining.samples import SampledTensor

Array = npt.NDArray[np.float64]

STEPS = 12  # of Newton's
ROUNDS = 3  # over all LoRAs, one after the other
CLEAN = 3.0  # times the energy of rounding that a weight may have left, for nothing else to be in it
TRACE = 16  # values that have to move for a scale to be told


@dataclass(frozen=True, slots=True)
class TensorFit:
    """One weight's own least squares: `scales` and `error` by LoRA, and its energy left over that of rounding.

    NaN for LoRAs that are not for it. `gram`, `moment` and `noise` are sums over its values.
    """

    sample: SampledTensor
    scales: Array
    gram: Array
    moment: Array
    noise: Array
    unit: float
    left: float

    @property
    def changed(self) -> bool:
        """True where the checkpoint is not the base, rounded."""
        return self.left >= 0

    @property
    def clean(self) -> bool:
        """True where rounding explains what LoRAs do not."""
        return self.changed and self.left <= CLEAN


@dataclass(frozen=True, slots=True)
class Estimate:
    """Scales of all LoRAs, with their standard errors by rounding; infinite where nothing can be said.

    `robust` are errors by how much whole weights disagree (each one cluster, as White 1980 has single values), and
    `spread` is how far single weights are from one scale, beyond their own errors.
    """

    scales: Array
    errors: Array
    robust: Array
    spread: Array
    fits: tuple[TensorFit, ...]


def fit_tensor(sample: SampledTensor, count: int) -> TensorFit:
    """Fit the LoRAs of one weight to its difference."""
    active = sorted(sample.loras)
    deltas = np.stack([sample.summands.deltas[number] for number in active])
    base = sample.summands.weights
    start = base if sample.kind is None else rounded(base, sample.kind)
    difference = sample.values - base
    unit = _noise(sample)
    gram = np.zeros((count, count))
    noise = np.zeros((count, count))
    moment = np.zeros(count)
    gram[np.ix_(active, active)] = deltas @ deltas.T
    noise[np.ix_(active, active)] = (deltas * unit) @ deltas.T
    moment[active] = deltas @ difference
    scales = np.full(count, np.nan)
    scales[active] = np.linalg.lstsq(gram[np.ix_(active, active)], moment[active], rcond=1e-10)[0]
    rest = difference - scales[active] @ deltas
    mean = float(unit.mean()) or np.finfo(float).tiny
    left = float((rest @ rest) / len(rest)) / mean
    if np.array_equal(start, sample.values):
        left = -1.0
    return TensorFit(sample, scales, gram, moment, noise, mean, left)


def _noise(sample: SampledTensor) -> Array:
    """The variance of each value by rounding; of codes, what the difference is at most."""
    if sample.kind is None:
        difference = sample.values - sample.summands.weights
        return np.full(len(difference), float(difference @ difference) / max(1, len(difference)))
    units = np.maximum(spacing(sample.values, sample.kind), spacing(sample.summands.weights, sample.kind))
    return np.asarray(units**2 / 12)


def estimate(samples: Sequence[SampledTensor], count: int) -> Estimate:
    """Fit all LoRAs to all weights together."""
    fits = tuple(fit_tensor(sample, count) for sample in samples)
    used = [fit for fit in fits if fit.clean] or [fit for fit in fits if fit.changed] or list(fits)
    gram = sum((fit.gram / fit.unit for fit in used), np.zeros((count, count)))
    moment = sum((fit.moment / fit.unit for fit in used), np.zeros(count))
    noise = sum((fit.noise / fit.unit**2 for fit in used), np.zeros((count, count)))
    scales = np.asarray(np.linalg.lstsq(gram, moment, rcond=1e-10)[0], np.float64)
    chosen = [fit.sample for fit in used]
    if any(fit.changed for fit in used):
        scales = _newton(used, gram, scales)
        for _ in range(ROUNDS if count > 1 else 1):
            for number in range(count):
                scales[number] = _most_allowed(chosen, scales, number)
    known = np.diag(gram) > 0
    inverse = np.asarray(np.linalg.pinv(gram, rcond=1e-10, hermitian=True), np.float64)
    errors = np.where(known, np.sqrt(np.maximum(np.diag(inverse @ noise @ inverse), 0)), np.inf)
    return Estimate(np.where(known, scales, 0.0), errors, _robust(used, inverse, scales), _spread(used, scales), fits)


def _robust(fits: Sequence[TensorFit], inverse: Array, scales: Array) -> Array:
    """Standard errors with each weight a cluster, of one that may have something else in it."""
    rests = [(fit.moment - fit.gram @ scales) / fit.unit for fit in fits]
    middle = sum((np.outer(rest, rest) for rest in rests), np.zeros_like(inverse))
    return np.asarray(np.sqrt(np.maximum(np.diag(inverse @ middle @ inverse), 0)))


def _newton(fits: Sequence[TensorFit], gram: Array, scales: Array) -> Array:
    """The scales at which rounded sums leave nothing that LoRAs explain."""
    best = scales.copy()
    least = np.inf
    now = scales.copy()
    for _ in range(STEPS):
        moment = np.zeros(len(now))
        energy = 0.0
        for fit in fits:
            sample = fit.sample
            total = sample.summands.total(now)
            rest = sample.values - (total if sample.kind is None else rounded(total, sample.kind))
            energy += float(rest @ rest) / fit.unit
            for number in sample.loras:
                moment[number] += float(sample.summands.deltas[number] @ rest) / fit.unit
        if energy < least:
            least = energy
            best = now.copy()
        step = np.linalg.lstsq(gram, moment, rcond=1e-10)[0]
        now = now + step
        if np.abs(step).max() < 1e-9:
            break
    return best


def _allowed(sample: SampledTensor, kind: dtypes.FloatFormat, scales: Array, number: int) -> tuple[Array, Array]:
    """The least and the largest scale of a LoRA at which each value comes out, where its delta is not 0."""
    delta = sample.summands.deltas[number]
    some = delta != 0
    others = scales.copy()
    others[number] = 0.0
    part = sample.summands.part(some)
    ends = [(end - part.total(others)) / delta[some] for end in intervals(sample.values[some], kind)]
    return np.minimum(*ends), np.maximum(*ends)


def _most_allowed(samples: Sequence[SampledTensor], scales: Array, number: int) -> float:
    """The scale that most values allow: the middle of where the count is highest."""
    pairs = [_allowed(one, one.kind, scales, number) for one in samples if one.kind is not None and number in one.loras]
    if not any(low.size for low, _ in pairs):
        return float(scales[number])
    lows = np.sort(np.concatenate([low for low, _ in pairs]))
    highs = np.sort(np.concatenate([high for _, high in pairs]))
    count = np.arange(1, len(lows) + 1) - np.searchsorted(highs, lows, side="left")
    at = np.flatnonzero(count == count.max())
    at = at[np.argmin(np.abs(lows[at] - scales[number]))]
    end = highs[np.searchsorted(highs, lows[at], side="left")]
    return float((lows[at] + end) / 2)


def _spread(fits: Sequence[TensorFit], scales: Array) -> Array:
    """The distance of single weights' scales from that of all, in the middle, less what their errors explain."""
    found = np.zeros(len(scales))
    for number in range(len(scales)):
        own = [(fit.scales[number], fit.noise[number, number], fit.gram[number, number]) for fit in fits]
        off = [
            max(0.0, abs(scale - scales[number]) - 3 * np.sqrt(noise) / gram)
            for scale, noise, gram in own
            if gram > 0 and np.isfinite(scale)
        ]
        found[number] = float(np.median(off)) if off else 0.0
    return found


def smallest_told(samples: Sequence[SampledTensor], scales: Array, number: int, error: float) -> float:
    """The smallest scale of a LoRA that `TRACE` of the values would show, beside the other LoRAs at their scales.

    Where the values lie on the grid that they are rounded to, as a base does, that is all; else some of any are next to
    a middle, and three standard errors are needed. Infinite where no scale could be told.
    """
    others = scales.copy()
    others[number] = 0.0
    needed = []
    on_grid = True
    for sample in samples:
        if number not in sample.loras or sample.kind is None:
            continue
        delta = sample.summands.deltas[number]
        total = sample.summands.part(delta != 0).total(others)
        near = rounded(total, sample.kind)
        on_grid = on_grid and np.array_equal(near, total)
        low, high = intervals(near, sample.kind)
        needed.append(np.minimum(total - low, high - total) / np.abs(delta[delta != 0]))
    every = np.concatenate(needed) if needed else np.zeros(0)
    every = every[np.isfinite(every)]
    least = float(np.partition(every, TRACE - 1)[TRACE - 1]) if len(every) >= TRACE else np.inf
    return least if on_grid else max(least, 3 * error)


def cosine_of(fits: Sequence[TensorFit], one: int, other: int) -> float:
    """The cosine of two LoRAs' deltas in the sampled rows."""
    gram = sum((fit.gram for fit in fits), np.zeros_like(fits[0].gram)) if fits else np.zeros((1, 1))
    size = float(np.sqrt(gram[one, one] * gram[other, other]))
    return float(gram[one, other]) / size if size else 0.0
