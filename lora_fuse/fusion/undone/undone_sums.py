"""Weights of a merged checkpoint as they were before the LoRAs were added, and how many of them are certain.

A checkpoint without the LoRA, or with it at another scale, shows it: where a weight was coarser than the sum is, about
half of all sums cannot have come from any. So what is taken out and is not there is refused, without the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import BadLora
from lora_fuse.fusion.adder import Adder, columns_of, read_deltas
from lora_fuse.fusion.plan import Target
from lora_fuse.fusion.undone.merge_marks import Rounding
from lora_fuse.fusion.undone.preimages import Exactly, KnownValues, Ordered, Preimages, preimages
from lora_fuse.lora import Delta, LowRank, NotFinite
from lora_fuse.recipe import records

BLOCK = 1 << 15  # values at a time: a dozen float64 arrays of them stay in a cache
# Of the sums that would show that a LoRA is not there, the part that may: in a merge that was rounded as is said it is
# 0, and of sums in float32 4 of 10000. Where a scale of 0.8 is taken for 0.79 it is 6 of 10 or more, and where a merge
# was rounded in another way 1 of 10 or more (docs/explain.md, Measured).
MOST = 0.05
ENOUGH = 64  # of such sums in one weight, to say it of that weight alone

Wide = npt.NDArray[np.float64]


def added(one: records.Unmerged, other: records.Unmerged) -> records.Unmerged:
    """The counts of both."""
    return records.Unmerged(
        one.elements + other.elements,
        one.certain + other.certain,
        one.uncertain + other.uncertain,
        one.impossible + other.impossible,
        one.telling + other.telling,
        max(one.largest_error, other.largest_error),
    )


NOTHING = records.Unmerged(0, 0, 0, 0, 0.0, 0.0)


def is_absent(counts: records.Unmerged) -> bool:
    """True where more sums are impossible than a merge has."""
    return counts.impossible > MOST * counts.telling


@dataclass(slots=True)
class UndoneSums:
    """LoRAs taken out of the weights of a checkpoint, in any thread, and what is known of each weight then."""

    rounding: Rounding
    by_target: dict[str, records.Unmerged] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def read(self, target: Target, _: str) -> Adder:
        """Read the deltas of a target, and choose what takes them out; it is told to this tally."""
        deltas = read_deltas(target)
        kind = dtypes.ROUNDABLE[target.tensor.dtype]
        columns = columns_of(target)

        def take_out(data: memoryview, first: int) -> None:
            stored = np.frombuffer(data, dtypes.DTYPES[target.tensor.dtype].numpy).reshape(-1, columns)
            rows = max(1, BLOCK // columns)
            for row in range(0, len(stored), rows):
                part = stored[row : row + rows]
                weights, counts = before(_widen(part), deltas, first + row, kind, self.rounding)
                part[...] = _narrow(weights, part.dtype)
                self._take(target, counts)

        return take_out

    def _take(self, target: Target, counts: records.Unmerged) -> None:
        name = target.tensor.name
        with self._lock:
            mine = self.by_target[name] = added(self.by_target.get(name, NOTHING), counts)
        if mine.telling >= ENOUGH and is_absent(mine):
            raise BadLora(self._absent(f"{target.shard.path}: {name!r}", mine))

    @property
    def total(self) -> records.Unmerged:
        """Of all weights, the same wherever it is counted."""
        total = NOTHING
        for name in sorted(self.by_target):
            total = added(total, self.by_target[name])
        telling, error = (records.rounded(value) for value in (total.telling, total.largest_error))
        return replace(total, telling=telling, largest_error=error)

    def refuse_absent(self, where: str) -> None:
        """Refuse a checkpoint that has not what is taken out of it.

        Raises:
            BadLora: see `is_absent`.
        """
        if is_absent(total := self.total):
            raise BadLora(self._absent(where, total))

    def _absent(self, where: str, counts: records.Unmerged) -> str:
        return (
            f"{where} does not have these LoRAs at these scales, rounded {self.rounding}: {counts.impossible} of "
            f"{counts.elements} elements are no such sum; without the LoRAs it would be about {counts.telling:.0f}, "
            f"and of their merge at most {MOST * counts.telling:.0f}. Give the LoRAs, scales, --only and --skip that "
            "it was merged with, and --rounding twice or thrice for one by PEFT or diffusers in 16 bits; nothing was "
            "written"
        )


def before(
    merged: Wide, deltas: Sequence[Delta], first: int, kind: dtypes.FloatFormat, rounding: Rounding = "once"
) -> tuple[Wide, records.Unmerged]:
    """The weights that rows of a merge, (n, columns), were, and what is known of them; `first` is the first row.

    Of several that a sum may have come from, the one nearest to the middle: so the error is the least that it can be.

    Raises:
        NotFinite: the merge holds NaN or infinity.
    """
    if not np.isfinite(merged).all():
        raise NotFinite("the checkpoint holds NaN or infinity")
    numbers = Ordered(kind)
    if rounding == "once":
        delta = _part(deltas, first, merged.shape)
        error = 2.0**-52 * sum(each.roundings + 2 for each in deltas) * sum(each.size for each in deltas)
        exactly = Exactly(deltas, first)
    else:
        delta = _rounded(numbers, deltas, first, merged.shape, products=rounding == "thrice")
        error = 0.0
        exactly = Exactly([KnownValues(delta)], 0)
    found = preimages(merged, delta, error, kind, exactly)
    weights, wrong = _chosen(numbers, found, merged - delta)
    weights = np.where((weights == 0) & (merged == 0), merged, weights)
    count = found.count
    several = count > 1
    counts = records.Unmerged(
        merged.size,
        int((count == 1).sum()),
        int(several.sum()),
        int((count < 1).sum()),
        _telling(merged, merged - delta, kind),
        float(wrong[several].max(initial=0.0)),
    )
    return weights, counts


def _chosen(numbers: Ordered, found: Preimages, near: Wide) -> tuple[Wide, Wide]:
    """The number nearest to the middle of those that are possible, or to `near` of none; and how far others are."""
    first = numbers.value(found.first)
    last = numbers.value(found.last)
    weights = first.copy()
    several = found.last > found.first
    weights[several] = numbers.value(numbers.nearest((first[several] + last[several]) / 2))
    none = found.last < found.first
    weights[none] = np.clip(numbers.value(numbers.nearest(near[none])), last[none], first[none])
    return weights, np.maximum(last - weights, weights - first)


def _telling(merged: Wide, near: Wide, kind: dtypes.FloatFormat) -> float:
    """The number of sums that would have no preimage at random: where weights are coarser, all but one in so many."""
    least = 1 - kind.bias
    of_sum, of_weight = (np.maximum(np.frexp(values)[1], least + 1) for values in (merged, near))
    coarser = of_weight > of_sum
    return float((1 - np.exp2((of_sum - of_weight)[coarser].astype(np.float64))).sum())


def _part(deltas: Sequence[Delta], first: int, shape: tuple[int, ...]) -> Wide:
    """The sum of deltas in some whole rows, float64."""
    total = np.zeros(shape)
    for delta in deltas:
        if isinstance(delta, LowRank) and delta.matrix.b is not None:
            total += (delta.factor * delta.matrix.a[first : first + len(total)]) @ delta.matrix.b
        else:
            import torch

            torch.set_num_threads(1)  # of this thread, as in `torch_sums`
            there = torch.from_numpy(total)
            delta.add_to(there, there, first, 0)
    return total


def _rounded(numbers: Ordered, deltas: Sequence[Delta], first: int, shape: tuple[int, ...], *, products: bool) -> Wide:
    """The delta rounded to a format, and if asked for its product of two matrices before the scale as well."""
    (delta,) = deltas
    if products and isinstance(delta, LowRank):
        product = numbers.nearest_even(_part([LowRank(delta.matrix, 1.0)], first, shape))
        return numbers.nearest_even(product * delta.factor)
    return numbers.nearest_even(_part(deltas, first, shape))


def _widen(stored: npt.NDArray[np.generic]) -> Wide:
    """Values as float64, without `ml_dtypes`, which holds Python's lock."""
    if stored.dtype != dtypes.DTYPES["BF16"].numpy:
        return stored.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _narrow(values: Wide, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    """Numbers of a format in it."""
    if dtype != dtypes.DTYPES["BF16"].numpy:
        return values.astype(dtype)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(dtype)
