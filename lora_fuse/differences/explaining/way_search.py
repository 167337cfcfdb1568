"""The way in which LoRAs were added, and the round scales that somebody gave: tried until the values come out. Pure.

Only values count that moved, or should have: most weights of a small delta are the base's whatever was done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.differences.explaining.estimation import TRACE
from lora_fuse.differences.explaining.float_rounding import FORMATS, rounded, spacing
from lora_fuse.differences.explaining.merge_ways import WAYS, MergeWay, Summands
from lora_fuse.differences.explaining.samples import BUDGET, SampledTensor

Array = npt.NDArray[np.float64]

FITS = 0.99  # of the values that moved come out, where sums in float32 are a few bits better than the result
FITS_FLOAT32 = 0.5  # where they are not: the order of a sum shows
MOST_ORDERS = 6  # of LoRAs one after the other
SCREENED = 1 << 16  # values on which everything is tried
GOOD = 0.999  # of values come out, so that scales are not looked for any better
DIGITS = 4  # behind the point of a scale that somebody would give
STEPS = 10  # of Newton's


@dataclass(frozen=True, slots=True)
class Recognised:
    """A way that fits, at scales: `order` of LoRAs, `equal` of `moved` values come out, in the weights `names`."""

    way: MergeWay
    scales: tuple[float, ...]
    order: tuple[int, ...]
    equal: int
    moved: int
    names: frozenset[str]

    def comes_out(self, summands: Summands, kind: dtypes.FloatFormat, values: Array) -> npt.NDArray[np.bool_]:
        """True for each value that is to be expected."""
        return self.way.comes_out(summands, self.scales, kind, self.order, values)

    def expected(self, summands: Summands, kind: dtypes.FloatFormat) -> Array:
        """The values that are to be expected, but for one in a million on the middle between two."""
        return self.way.make(summands, self.scales, kind, self.order)


class _Moved:
    """The values of one sample that moved, or would at some scales; at most `most` of them."""

    def __init__(self, sample: SampledTensor, kind: dtypes.FloatFormat, scales: Sequence[float], most: int) -> None:
        start = rounded(sample.summands.weights, kind)
        meant = rounded(sample.summands.total(scales), kind)
        places = np.flatnonzero((sample.values != start) | (meant != start))
        where = np.zeros(len(start), bool)
        where[places[:: max(1, len(places) // most)]] = True
        self.name = sample.name
        self.kind = kind
        self.summands = sample.summands.part(where)
        self.values = sample.values[where]
        self.size = len(self.values)
        self.unit = float(np.mean(spacing(self.values, kind) ** 2)) if self.size else 1.0
        self.needed = FITS_FLOAT32 if kind == FORMATS["F32"] else FITS

    def equal(self, way: MergeWay, scales: Sequence[float], order: Sequence[int]) -> int:
        """Count those that a way makes."""
        return int(way.comes_out(self.summands, scales, self.kind, order, self.values).sum())


def recognise(samples: Sequence[SampledTensor], scales: Array) -> Recognised | None:
    """Find round scales near those that were estimated, and the way that fits most weights; None where none does.

    All ways and orders are tried on a few values, and the best of them on all. Scales are estimated as if sums were
    rounded once: if that fits badly, they are estimated anew for each way.
    """
    plain = [one for one in samples if one.kind is not None]
    few = _moved(plain, scales, max(1, SCREENED // max(1, len(plain))))
    if sum(one.size for one in few) < 1:
        return None
    tried = list(_tried(len(scales), scales))
    best = _best(few, [(way, order, _snapped(few, way, order, scales)) for way, order in tried])
    if _share(few, *best) < GOOD:
        refined = [(way, order, _newton(few, way, order, scales)) for way, order in tried]
        best = _best(few, [best, *((way, order, _snapped(few, way, order, some)) for way, order, some in refined)])
    return _measured(_moved(plain, np.array(best[2]), BUDGET), *best)


Trial = tuple[MergeWay, tuple[int, ...], list[float]]


def _moved(samples: Sequence[SampledTensor], scales: Array, most: int) -> list[_Moved]:
    found = [_Moved(one, one.kind, scales.tolist(), most) for one in samples if one.kind is not None]
    return [one for one in found if one.size]


def _tried(count: int, scales: Array) -> Iterator[tuple[MergeWay, tuple[int, ...]]]:
    """Ways, each with the orders in which LoRAs may have been added."""
    active = [number for number in range(count) if scales[number]]
    for way in WAYS:
        for order in list(permutations(active))[:MOST_ORDERS] if way.ordered else [tuple(active)]:
            yield way, order


def _share(moved: Sequence[_Moved], way: MergeWay, order: tuple[int, ...], scales: Sequence[float]) -> float:
    """The share of values that come out, of weights in which most do; of all where there are none such."""
    pairs = [(one.equal(way, scales, order), one.size) for one in moved]
    fitting = [pair for pair, one in zip(pairs, moved, strict=True) if pair[0] >= one.needed * one.size] or pairs
    return sum(count for count, _ in fitting) / sum(size for _, size in fitting)


def _best(moved: Sequence[_Moved], trials: Sequence[Trial]) -> Trial:
    """The trial that fits most weights, and of those most values; the first of equal ones."""

    def fit(trial: Trial) -> tuple[int, int]:
        way, order, scales = trial
        pairs = [(one.equal(way, scales, order), one) for one in moved]
        fitting = sum(one.size for count, one in pairs if count >= one.needed * one.size)
        return fitting, sum(count for count, _ in pairs)

    return max(trials, key=fit)


def _measured(moved: Sequence[_Moved], way: MergeWay, order: tuple[int, ...], scales: list[float]) -> Recognised | None:
    """The weights that come out in a way; None where those are none."""
    pairs = [(one, one.equal(way, scales, order)) for one in moved]
    fitting = [(one, count) for one, count in pairs if count >= one.needed * one.size]
    size = sum(one.size for one, _ in fitting)
    if size < TRACE:
        return None
    equal = sum(count for _, count in fitting)
    return Recognised(way, tuple(scales), order, equal, size, frozenset(one.name for one, _ in fitting))


def _snapped(moved: Sequence[_Moved], way: MergeWay, order: tuple[int, ...], scales: Array) -> list[float]:
    """The scales in as few digits as fit as well as any."""

    def equal(some: Sequence[float]) -> int:
        return sum(one.equal(way, some, order) for one in moved)

    raw = scales.tolist()
    least = max(1, sum(one.size for one in moved) // 5_000)
    tried = [[round(scale, digits) for scale in raw] for digits in range(DIGITS + 1)]
    counts = [equal(some) for some in (*tried, raw)]
    now = next(some for some, count in zip((*tried, raw), counts, strict=True) if count >= max(counts) - least)
    reached = equal(now)
    for number in range(len(now)):
        for simpler in dict.fromkeys([0.0, *(round(now[number], digits) for digits in range(DIGITS))]):
            other = [*now[:number], simpler, *now[number + 1 :]]
            if simpler != now[number] and equal(other) >= reached - (0 if simpler == 0.0 else least // 4):
                now = other
                reached = max(reached, equal(now))
                break
    return [scale + 0.0 for scale in now]


def _newton(moved: Sequence[_Moved], way: MergeWay, order: tuple[int, ...], scales: Array) -> Array:
    """The scales at which a way leaves nothing that the LoRAs explain."""
    now = scales.copy()
    deltas = [np.stack(one.summands.deltas) for one in moved]
    gram = sum((each @ each.T / one.unit for each, one in zip(deltas, moved, strict=True)), np.zeros((len(now),) * 2))
    for _ in range(STEPS):
        moment = np.zeros(len(now))
        for each, one in zip(deltas, moved, strict=True):
            moment += each @ (one.values - way.make(one.summands, now, one.kind, order)) / one.unit
        now = now + np.linalg.lstsq(gram, moment, rcond=1e-10)[0]
    return now


def trace_of(samples: Sequence[SampledTensor], found: Recognised, number: int) -> int:
    """The number of values that come out with a LoRA and would not without it."""
    without = list(found.scales)
    without[number] = 0.0
    left = tuple(one for one in found.order if one != number)
    more = 0
    for sample in samples:
        if sample.kind is not None and number in sample.loras and sample.name in found.names:
            parts = (sample.summands, sample.kind, sample.values)
            more += int(found.comes_out(*parts).sum())
            more -= int(found.way.comes_out(sample.summands, without, sample.kind, left, sample.values).sum())
    return more
