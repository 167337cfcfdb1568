"""One target derived again: some of its rows, or all, and by how much it changed there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_fuse.recipe import records
from lora_fuse.verification.coded_weights import CodedTensor
from lora_fuse.verification.expectation import ExpectedDelta
from lora_fuse.verification.nearest import FLOATS, Wide, is_nearest, widen
from lora_fuse.verification.weights import Rows, StoredTensor, drawn_rows, row_blocks

LITTLE = 0.95  # a cosine: of bfloat16, at a change of a thousandth of the weights .66, of a hundredth .986


@dataclass(frozen=True, slots=True)
class Change:
    """The change of a target, over the rows that were looked at.

    `relative_norm` is the norm of the difference over that of the base's weights (Frobenius), `unchanged` the share of
    the weights that rounding left as they were. The other two are those of `Kept`.
    """

    relative_norm: float
    unchanged: float
    cosine: float | None
    noise: float | None


@dataclass(frozen=True, slots=True)
class Kept:
    """The part of the intended change D of weights W that the stored ones have, beside what rounding did to them.

    `cosine` is that of ``stored - W`` and D, `noise` the energy ``|stored - (W + D)|**2 / |D|**2``: 0 for float64, in
    which the sum is taken. None where nothing is to be added.
    """

    cosine: float | None = None
    noise: float | None = None


class Sums:
    """Sums over the rows of a target, or of many, that `Change` and `Kept` are made of."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sums = np.zeros(7)

    def add(self, before: Wide, added: Wide, stored: Wide) -> None:
        """Take in some rows of the base, what is to be added to them, and what was written."""
        realised = stored - before
        parts = (before, added, realised, realised - added)
        squares = [float(np.square(part).sum()) for part in parts]
        together = float(np.vdot(added, realised))
        self._sums += [*squares, together, float((realised == 0).sum()), float(before.size)]

    def add_share(self, other: Sums, times: float) -> None:
        """Take in what is known of some rows for all rows of a weight, which are so many times as many."""
        self._sums += other._sums * times

    def kept(self, dtype: str) -> Kept:
        """The part that was kept of the change, in weights of a dtype."""
        _, added, realised, off, together, _, _ = self._sums.tolist()
        if not added:
            return Kept()
        cosine = records.rounded(together / math.sqrt(added * realised)) if realised else 0.0
        return Kept(cosine, 0.0 if dtype == "F64" else records.rounded(off / added, 6))

    def change(self, dtype: str) -> Change:
        """The change of a target, of a dtype."""
        base, added, _, _, _, same, seen = self._sums.tolist()
        norm = math.sqrt(added / base) if base else math.inf if added else 0.0
        kept = self.kept(dtype)
        return Change(records.rounded(norm), records.rounded(same / max(seen, 1)), kept.cosine, kept.noise)


@dataclass(slots=True)
class TargetCheck:
    """The check of a target: the rows that were looked at, and its change with what that is made of, or a problem."""

    rows_total: int = 0
    rows_checked: int = 0
    rows_drawn: int = 0
    change: Change | None = None
    sums: Sums = field(default_factory=Sums)
    problem: str = ""


def check_target(
    name: str,
    merged: StoredTensor,
    base: StoredTensor,
    deltas: Sequence[ExpectedDelta],
    rows: int | None,
    seed: int | None,
) -> TargetCheck:
    """Derive rows of a target again: so many that its name draws and as many that `seed` draws, or all, if None."""
    found = TargetCheck()
    total = len(base)
    if merged.shape != base.shape:
        found.problem = f"{name} has the shape {merged.shape}, the base has {base.shape}"
        return found
    again = isinstance(merged, CodedTensor)
    if not merged.is_like(base) if again else merged.dtype != base.dtype or base.dtype not in FLOATS:
        found.problem = f"{name} is {merged.dtype}, the base's {base.dtype}; sums are rounded to {FLOATS}"
        return found
    found.rows_total = total
    try:
        derived = [delta.derive(total, base.read) for delta in deltas]
        for measured in row_blocks(name, total, rows):
            block = measured
            if seed is not None and rows is not None and len(measured) < total:
                drawn = drawn_rows(seed, name, total, rows, measured)
                seams = np.concatenate([delta.seams for delta in deltas])  # where a cut may be a row too early or late
                drawn = np.union1d(drawn, np.setdiff1d(seams, measured))
                found.rows_drawn += len(drawn)
                block = np.concatenate([measured, drawn])
            _check_rows(name, merged, base, derived, block, len(measured), found)
            if found.problem:
                return found
    except (ValueError, IndexError) as error:
        found.problem = f"{name}: a delta does not fit {base.shape}: {error}"
        return found
    found.change = found.sums.change(merged.dtype)
    return found


def is_converted(name: str, merged: StoredTensor, base: StoredTensor) -> bool:
    """True where each value of a tensor is the nearest of the merge's dtype to the base's."""
    if not merged.is_like(base):
        return False
    if base.shape and base.nbytes:
        return not check_target(name, merged, base, [], None, None).problem
    return bool(is_nearest(merged.read(), widen(base.read())).all())


def _check_rows(
    name: str,
    merged: StoredTensor,
    base: StoredTensor,
    derived: Sequence[Callable[[Rows], Wide]],
    block: Rows,
    measured: int,
    found: TargetCheck,
) -> None:
    """Derive some rows again, of which the first are measured."""
    before = widen(base.read(block)).reshape(len(block), -1)
    added = np.zeros(before.shape)
    for delta in derived:
        added += delta(block)
    exact = before + added
    stored = merged.read(block).reshape(exact.shape)
    ours = widen(stored)
    found.rows_checked += measured
    wrong = merged.off(exact, block) if isinstance(merged, CodedTensor) else ~is_nearest(stored, exact)
    if isinstance(merged, CodedTensor) and merged.unused(block):
        found.problem = f"{name}: its scale is so large that half of the numbers that its codes can be are not used"
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        found.problem = (
            f"{name}: {int(wrong.sum())} of {wrong.size} values looked at are not base + delta rounded once, "
            f"first [{block[row]}, {column}]: {stored[row, column]!s}, expected {exact[row, column]:.9g}"
        )
    found.sums.add(before[:measured], added[:measured], ours[:measured])
