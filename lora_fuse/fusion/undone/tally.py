"""Weights of a merged checkpoint as they were before the LoRAs were added, and how many of them are certain.

A checkpoint without the LoRA, or with it at another scale, shows it: where a weight was coarser than the sum is, about
half of all sums cannot have come from any. So what is taken out and is not there is refused, without the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import BadCheckpoint, BadLora
from lora_fuse.fusion.adder import Adder, columns_of, read_deltas
from lora_fuse.fusion.plan import Target
from lora_fuse.fusion.undone.preimages import Exactly, Ordered, Preimages, preimages
from lora_fuse.lora import Delta, LowRank, NotFinite
from lora_fuse.recipe import records

BLOCK = 1 << 15  # values at a time: a dozen float64 arrays of them stay in a cache
# Of the sums that would show that a LoRA is not there, the part that may: 0 in a merge that is rounded once. One that
# rounds the delta first, as diffusers and PEFT do, has some hundredths (docs/explain.md).
MOST = 0.25
ENOUGH = 64  # of such sums in one weight, to say it of that weight alone

Wide = npt.NDArray[np.float64]


@dataclass(slots=True)
class Counts:
    """Elements of one or more weights, by what is known of them before the merge.

    `telling` is how many would be `impossible` if nothing had been added; `largest_error` bounds that of the uncertain.
    """

    elements: int = 0
    certain: int = 0
    uncertain: int = 0
    impossible: int = 0
    telling: float = 0.0
    largest_error: float = 0.0

    def add(self, other: Counts) -> None:
        """Take in other elements."""
        self.elements += other.elements
        self.certain += other.certain
        self.uncertain += other.uncertain
        self.impossible += other.impossible
        self.telling += other.telling
        self.largest_error = max(self.largest_error, other.largest_error)

    @property
    def is_absent(self) -> bool:
        """True where more sums are impossible than roundings of another order could make so."""
        return self.impossible > MOST * self.telling


@dataclass(slots=True)
class Tally:
    """What is known of the weights of a checkpoint without its LoRAs, weight by weight; told from any thread."""

    by_target: dict[str, Counts] = field(default_factory=dict)
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
                weights, counts = before(_widen(part), deltas, first + row, kind)
                part[...] = _narrow(weights, part.dtype)
                self._take(target, counts)

        return take_out

    def _take(self, target: Target, counts: Counts) -> None:
        with self._lock:
            mine = self.by_target.setdefault(target.tensor.name, Counts())
            mine.add(counts)
            if mine.telling >= ENOUGH and mine.is_absent:
                raise BadLora(_absent(f"{target.shard.path}: {target.tensor.name!r}", mine))

    @property
    def total(self) -> Counts:
        """Of all weights."""
        total = Counts()
        for name in sorted(self.by_target):
            total.add(self.by_target[name])
        return total

    @property
    def record(self) -> records.Unmerged:
        """The counts, for a manifest."""
        total = self.total
        return records.Unmerged(
            total.elements,
            total.certain,
            total.uncertain,
            total.impossible,
            records.rounded(total.telling),
            records.rounded(total.largest_error),
        )

    def refuse_absent(self, where: str) -> None:
        """Refuse a checkpoint that has not what is taken out of it.

        Raises:
            BadLora: see `Counts.is_absent`.
        """
        total = self.total
        if total.is_absent:
            raise BadLora(_absent(where, total))


def _absent(where: str, counts: Counts) -> str:
    return (
        f"{where} does not have these LoRAs at these scales: {counts.impossible} of {counts.elements} elements are no "
        f"sum with them; of weights without them about {counts.telling:.0f} would be, of their merge none. Give "
        "the LoRAs, scales, --only and --skip that it was merged with; nothing was written"
    )


def before(merged: Wide, deltas: Sequence[Delta], first: int, kind: dtypes.FloatFormat) -> tuple[Wide, Counts]:
    """The weights that rows of a merge, (n, columns), were, and what is known of them; `first` is the first row.

    Of several that a sum may have come from, the one nearest to the middle: so the error is the least that it can be.

    Raises:
        NotFinite: the merge holds NaN or infinity.
    """
    if not np.isfinite(merged).all():
        raise NotFinite("the checkpoint holds NaN or infinity")
    delta = _part(deltas, first, merged.shape)
    error = 2.0**-52 * sum(each.roundings + 2 for each in deltas) * sum(each.size for each in deltas)
    found = preimages(merged, delta, error, kind, Exactly(deltas, first))
    numbers = Ordered(kind)
    weights, wrong = _chosen(numbers, found, merged - delta)
    weights = np.where((weights == 0) & (merged == 0), merged, weights)
    count = found.count
    several = count > 1
    counts = Counts(
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
    first, last = numbers.value(found.first), numbers.value(found.last)
    weights = first.copy()
    several = found.last > found.first
    weights[several] = numbers.value(numbers.nearest((first[several] + last[several]) / 2))
    none = found.last < found.first
    weights[none] = np.clip(numbers.value(numbers.nearest(near[none])), last[none], first[none])
    return weights, np.maximum(last - weights, weights - first)


def _telling(merged: Wide, near: Wide, kind: dtypes.FloatFormat) -> float:
    """How many sums would have no preimage if they lay at random: where weights are coarser, all but one in so many."""
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

            there = torch.from_numpy(total)
            delta.add_to(there, there, first, 0)
    return total


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


def refuse_unsuited(target: Target) -> None:
    """Refuse to take out what leaves no trace of the base, and what depends on it.

    Raises:
        BadLora: a delta is put in the place of the base's values, or has lengths that depend on them.
        BadCheckpoint: the weight is codes, or float64.
    """
    what = f"{target.shard.path}: {target.tensor.name!r}"
    for scaled in target.deltas:
        delta = scaled.placed.delta
        if delta.is_replacement or delta.has_dora:
            why = (
                "is put in the place of the base's values, of which nothing is left"
                if delta.is_replacement
                else "is DoRA, which makes lengths of the base's own values"
            )
            raise BadLora(f"{scaled.lora.path}: {delta.module!r} {why}; it cannot be taken out, get the base itself")
    if target.stored is not None or not math.isfinite(dtypes.ROUNDABLE[target.tensor.dtype].largest):
        raise BadCheckpoint(f"{what} is quantised, so its sums are not there any more; use the merge it was made of")
    if target.tensor.dtype == "F64":
        raise BadCheckpoint(f"{what} is F64, and sums in that are not rounded exactly; use another merge")
