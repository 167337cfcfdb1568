"""Two versions of a LoRA, compared as files: their content, and the norms and angles of their differences.

The differences are taken row by row, for as many rows of each weight as a verification looks at, by the code that
verifies a merge (`lora_fuse.verification.expectation`): every format and algorithm is compared in the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from lora_fuse.checkpoint import blocks
from lora_fuse.lora import LoraFile, LoraInput, Selection
from lora_fuse.verification import ExpectedDelta, Weights, find_components, row_blocks, weight_files

ROWS = 16  # of each weight


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file's content in words: numbers of modules by algorithm and key format, rank, alpha and dtype."""

    label: str
    sha256: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """One block of the model: norm of the difference over that of the weights, for both, and the cosine of the two."""

    block: str
    current: float
    new: float
    cosine: float | None


@dataclass(slots=True)
class _Sums:
    """Inner products over rows."""

    base: float = 0.0
    current: float = 0.0
    new: float = 0.0
    product: float = 0.0

    def add(self, other: _Sums) -> None:
        for name in ("base", "current", "new", "product"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def cosine(self) -> float | None:
        size = math.sqrt(self.current * self.new)
        return self.product / size if size else None

    def over_base(self, square: float) -> float:
        """The norm whose square is given, over the base's."""
        return math.sqrt(square / self.base) if self.base else 0.0


@dataclass(frozen=True, slots=True)
class FileComparison:
    """The new file beside the current one, each at its own factor and scale 1.

    `ratio` is the norm of the new differences over that of the current ones, where both have one; None if either is 0.
    """

    both: int  # weights that both change
    only_new: tuple[str, ...]  # weights that only the new one changes
    only_current: tuple[str, ...]  # weights that only the current one changes
    ratio: float | None
    lowest: float  # the smallest ratio of any weight
    highest: float  # the largest
    cosine: float | None  # of the angle between all the new and all the current differences; None if either is 0
    blocks: tuple[BlockDifference, ...] = ()  # by block, in the model's order


def facts_of(lora: LoraFile, label: str) -> FileFacts:
    """A file in a few lines, the commonest first."""
    counted = Counter(delta.description for delta in lora.deltas)
    dtypes = Counter(tensor.dtype for tensor in lora.header.tensors.values())
    lines = [f"{count} x {words}" for words, count in counted.most_common()]
    lines.append("stored as " + ", ".join(f"{dtype} ({count} tensors)" for dtype, count in sorted(dtypes.items())))
    return FileFacts(label, lora.sha256, tuple(lines))


def compare_files(
    current: LoraInput, new: LoraInput, base: Path, leave_out: tuple[str, ...] = (), rows: int = ROWS
) -> FileComparison:
    """Compare the differences that two LoRAs (files or PEFT folders) make to a base, by so many rows of each weight.

    Of several components the names of weights begin with the component's; `leave_out` is that of `Selection`.

    Raises:
        BadCheckpoint: the base has no weights.
    """
    sides = [
        find_components(base, [replace(lora, scale=1.0)], Selection(leave_out=leave_out)) for lora in (current, new)
    ]
    components = sorted({name for side in sides for name in side.names})
    before: set[str] = set()
    after: set[str] = set()
    sums: dict[str, _Sums] = {}
    for component in components:
        weights = Weights(weight_files(base, component))
        ours, theirs = (side.expected(component, weights).deltas for side in sides)
        prefix = f"{component}/" if len(components) > 1 else ""
        before |= {prefix + name for name in ours}
        after |= {prefix + name for name in theirs}
        with threadpool_limits(1, user_api="blas"):  # products of so few rows are done before more threads wake
            for name in sorted(ours.keys() | theirs.keys()):
                sums[prefix + name] = _measure(name, weights, ours.get(name, []), theirs.get(name, []), rows)
    both = sorted(before & after)
    total = _Sums()
    for name in both:
        total.add(sums[name])
    ratios = [math.sqrt(sums[name].new / sums[name].current) for name in both if sums[name].current]
    return FileComparison(
        len(both),
        tuple(sorted(after - before)),
        tuple(sorted(before - after)),
        math.sqrt(total.new / total.current) if total.current and total.new else None,
        min(ratios, default=math.nan),
        max(ratios, default=math.nan),
        total.cosine,
        _by_block(sums),
    )


def _measure(name: str, base: Weights, before: list[ExpectedDelta], after: list[ExpectedDelta], rows: int) -> _Sums:
    sums = _Sums()
    total = len(base[name])
    derived = [[delta.derive(total, base[name].read) for delta in side] for side in (before, after)]
    for block in row_blocks(name, total, rows):
        weight = base[name].read(block).reshape(len(block), -1).astype(np.float64)
        current, new = (sum((delta(block) for delta in side), np.zeros(weight.shape)) for side in derived)
        pairs = ((weight, weight), (current, current), (new, new), (current, new))
        sums.add(_Sums(*(float((a * b).sum()) for a, b in pairs)))
    return sums


def _by_block(sums: Mapping[str, _Sums]) -> tuple[BlockDifference, ...]:
    by_block: dict[str, _Sums] = {}
    for name, own in sums.items():
        by_block.setdefault(blocks.block_of(name), _Sums()).add(own)
    ordered = [(block, by_block[block]) for block in blocks.in_order(by_block)]
    return tuple(
        BlockDifference(block, own.over_base(own.current), own.over_base(own.new), own.cosine) for block, own in ordered
    )
