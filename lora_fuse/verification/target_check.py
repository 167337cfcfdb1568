"""One target derived again: some of its rows, or all, and by how much it changed there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_fuse.recipe import records
from lora_fuse.verification.expectation import ExpectedDelta
from lora_fuse.verification.nearest import FLOATS, Wide, is_nearest, widen
from lora_fuse.verification.weights import Rows, StoredTensor, drawn_rows, row_blocks


@dataclass(frozen=True, slots=True)
class Change:
    """The change of a target, over the rows that were looked at.

    `relative_norm` is the norm of the difference over that of the base's weights (Frobenius), `unchanged` the share of
    the weights that rounding left as they were.
    """

    relative_norm: float
    unchanged: float


@dataclass(slots=True)
class TargetCheck:
    """The check of a target: the rows that were looked at, and its change, or a problem."""

    rows_total: int = 0
    rows_checked: int = 0
    rows_drawn: int = 0
    change: Change | None = None
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
    if merged.dtype != base.dtype or base.dtype not in FLOATS:
        found.problem = f"{name} is {merged.dtype}, the base's {base.dtype}; sums are rounded to {FLOATS}"
        return found
    found.rows_total = total
    try:
        derived = [delta.derive(total, base.read) for delta in deltas]
        sums = np.zeros(4)
        for measured in row_blocks(name, total, rows):
            block = measured
            if seed is not None and rows is not None and len(measured) < total:
                drawn = drawn_rows(seed, name, total, rows, measured)
                found.rows_drawn += len(drawn)
                block = np.concatenate([measured, drawn])
            sums += _check_rows(name, merged, base, derived, block, len(measured), found)
            if found.problem:
                return found
    except (ValueError, IndexError) as error:
        found.problem = f"{name}: a delta does not fit {base.shape}: {error}"
        return found
    found.change = _change(*sums.tolist())
    return found


def _check_rows(
    name: str,
    merged: StoredTensor,
    base: StoredTensor,
    derived: Sequence[Callable[[Rows], Wide]],
    block: Rows,
    measured: int,
    found: TargetCheck,
) -> Wide:
    """Derive some rows again, of which the first are measured; returns what `_change` is made of."""
    before = widen(base.read(block)).reshape(len(block), -1)
    added = np.zeros(before.shape)
    for delta in derived:
        added += delta(block)
    exact = before + added
    stored = merged.read(block).reshape(exact.shape)
    ours = widen(stored)
    found.rows_checked += measured
    wrong = ~is_nearest(stored, exact)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        found.problem = (
            f"{name}: {int(wrong.sum())} of {wrong.size} values looked at are not base + delta rounded once, "
            f"first [{block[row]}, {column}]: {stored[row, column]!s}, expected {exact[row, column]:.9g}"
        )
    seen = slice(measured)
    squares = [float(np.square(part[seen]).sum()) for part in (before, added)]
    return np.array([*squares, float((before == ours)[seen].sum()), float(before[seen].size)])


def _change(base: float, added: float, same: float, seen: float) -> Change:
    """The change of a target, from sums of squares (the base, what is added to it) and counts (the same, all)."""
    norm = math.sqrt(added / base) if base else math.inf if added else 0.0
    return Change(records.rounded(norm), records.rounded(same / max(seen, 1)))
