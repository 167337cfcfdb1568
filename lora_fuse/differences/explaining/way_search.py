"""The way in which LoRAs were added, and the round scales that somebody gave: tried until the values come out. Pure.

Only values count that moved, or should have: most weights of a small delta are the base's whatever was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.differences.explaining.estimation import DIGITS, TRACE
from lora_fuse.differences.explaining.float_rounding import FORMATS, rounded
from lora_fuse.differences.explaining.merge_ways import BY_KEY, WAYS, MergeWay, Summands
from lora_fuse.differences.explaining.samples import SampledTensor

Array = npt.NDArray[np.float64]

FITS = 0.99  # of the values that moved come out, where sums in float32 are a few bits better than the result
FITS_FLOAT32 = 0.5  # where they are not: the order of a sum shows
MOST_ORDERS = 6  # of LoRAs one after the other


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
    """The values of one sample that moved, or would at some scales."""

    def __init__(self, sample: SampledTensor, kind: dtypes.FloatFormat, scales: Sequence[float]) -> None:
        start = rounded(sample.summands.weights, kind)
        meant = rounded(sample.summands.total(scales), kind)
        where = (sample.values != start) | (meant != start)
        self.name = sample.name
        self.kind = kind
        self.summands = sample.summands.part(where)
        self.values = sample.values[where]
        self.size = len(self.values)
        self.needed = FITS_FLOAT32 if kind == FORMATS["F32"] else FITS

    def equal(self, way: MergeWay, scales: Sequence[float], order: Sequence[int]) -> int:
        """Count those that a way makes."""
        return int(way.comes_out(self.summands, scales, self.kind, order, self.values).sum())


def recognise(samples: Sequence[SampledTensor], scales: Array) -> Recognised | None:
    """Find round scales near those that were estimated, and the way that fits most weights; None where none does."""
    moved = [_Moved(one, one.kind, scales.tolist()) for one in samples if one.kind is not None]
    moved = [one for one in moved if one.size]
    if sum(one.size for one in moved) < TRACE:
        return None
    round_scales = _snapped(moved, scales)
    order = tuple(range(len(scales)))
    best: Recognised | None = None
    for way in WAYS:
        active = [number for number in order if round_scales[number]]
        orders = list(permutations(active))[:MOST_ORDERS] if way.ordered else [tuple(active)]
        for one in orders:
            found = _measured(moved, way, round_scales, one)
            if found is not None and (best is None or found.equal > best.equal):
                best = found
    return best


def _measured(
    moved: Sequence[_Moved], way: MergeWay, scales: Sequence[float], order: tuple[int, ...]
) -> Recognised | None:
    """The weights that come out in a way; None where those are none."""
    pairs = [(one, one.equal(way, scales, order)) for one in moved]
    fitting = [(one, count) for one, count in pairs if count >= one.needed * one.size]
    size = sum(one.size for one, _ in fitting)
    if size < TRACE:
        return None
    equal = sum(count for _, count in fitting)
    return Recognised(way, tuple(scales), order, equal, size, frozenset(one.name for one, _ in fitting))


def _snapped(moved: Sequence[_Moved], scales: Array) -> list[float]:
    """The scales in as few digits as fit as well as any."""
    once = BY_KEY["once"]

    def equal(some: Sequence[float]) -> int:
        return sum(one.equal(once, some, ()) for one in moved)

    raw = scales.tolist()
    least = max(1, sum(one.size for one in moved) // 10_000)
    tried = [[round(scale, digits) for scale in raw] for digits in range(DIGITS + 1)]
    counts = [equal(some) for some in (*tried, raw)]
    good = [some for some, count in zip((*tried, raw), counts, strict=True) if count >= max(counts) - least]
    now = list(good[0])
    reached = equal(now)
    for number in range(len(now)):
        for simpler in dict.fromkeys([0.0, *(round(now[number], digits) for digits in range(DIGITS))]):
            other = [*now[:number], simpler, *now[number + 1 :]]
            if simpler != now[number] and (count := equal(other)) >= reached - (0 if simpler == 0.0 else least // 4):
                now = other
                reached = max(reached, count)
                break
    return [scale + 0.0 for scale in now]


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
