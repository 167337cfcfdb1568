"""Two versions of a LoRA, compared as files: their content, and the norms and angles of their differences.

The differences are read by the code that verifies a merge (`lora_fuse.verification.expectation`). Of two plain LoRAs
``B A`` norms and angles are exact, and no product is made: ``<B A, D C> = <B^T D, A C^T>``, two matrices as small as
the ranks. Of other kinds they are estimated from as many rows of each weight as a verification looks at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from lora_fuse.checkpoint import blocks
from lora_fuse.lora import LoraFile, LoraInput, Selection
from lora_fuse.verification import ExpectedDelta, Weights, find_components, row_blocks, weight_files

Factors = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

ROWS = 16  # of each weight
# Cosines of two files' differences; docs/validation.md has what they were for files of known kinds.
SAME_DIRECTION = 0.99  # from here on they hold the same differences, only stronger or weaker
ONE_TRAINING = 0.5  # one goes on from the other, or both from one start
ALIKE = 0.2


class Kinship(StrEnum):
    """The relation of two LoRAs by the angle between their differences."""

    SAME = "the same differences"
    VERSION = "another version of the same training"
    ALIKE = "a training of its own, on the same or something like it"
    OTHER = "something else"
    OPPOSITE = "the other way round"

    @classmethod
    def of(cls, cosine: float) -> Kinship:
        """By the cosine of the angle."""
        if cosine <= -ONE_TRAINING:
            return cls.OPPOSITE
        limits = ((SAME_DIRECTION, cls.SAME), (ONE_TRAINING, cls.VERSION), (ALIKE, cls.ALIKE))
        return next((kinship for limit, kinship in limits if cosine >= limit), cls.OTHER)


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

    def times(self, factor: float) -> None:
        """Multiply all: rows may stand for others that are like them."""
        for name in ("base", "current", "new", "product"):
            setattr(self, name, factor * getattr(self, name))

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

    @property
    def kinship(self) -> Kinship | None:
        """The relation of the two; None where either does nothing to the weights that both change."""
        return None if self.cosine is None else Kinship.of(self.cosine)

    @property
    def kin(self) -> str:
        """The same in words, with the cosines of all and of blocks."""
        if self.kinship is None or self.cosine is None:
            return "nothing that could be compared"
        cosines = [block.cosine for block in self.blocks if block.cosine is not None]
        by_block = f", by block {min(cosines):.3f} to {max(cosines):.3f}" if len(cosines) > 1 else ""
        return f"{self.kinship}: cosine {self.cosine:.3f}{by_block}"


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
    """Compare the differences that two LoRAs (files or PEFT folders) make to a base.

    So many `rows` of each weight are read of the base, and of differences that are not plain LoRAs'.

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
    plain = [[one for delta in side if (one := delta.factors) is not None] for side in (before, after)]
    is_plain = [len(side) for side in plain] == [len(before), len(after)]
    derived = [[] if is_plain else [delta.derive(total, base[name].read) for delta in side] for side in (before, after)]
    read = 0
    for block in row_blocks(name, total, rows):
        weight = base[name].read(block).reshape(len(block), -1).astype(np.float64)
        current, new = (sum((delta(block) for delta in side), np.zeros(weight.shape)) for side in derived)
        pairs = ((weight, weight), (current, current), (new, new), (current, new))
        sums.add(_Sums(*(float((a * b).sum()) for a, b in pairs)))
        read += len(block)
    sums.times(total / read)
    if is_plain:
        ours, theirs = plain
        sums.add(_Sums(0.0, *(_inner(*pair) for pair in ((ours, ours), (theirs, theirs), (ours, theirs)))))
    return sums


def _inner(some: Sequence[Factors], others: Sequence[Factors]) -> float:
    """The inner product of two sums of products, from matrices as small as their ranks."""
    return sum(float(((up.T @ to) * (down @ of.T)).sum()) for (up, down), (to, of) in product(some, others))


def _by_block(sums: Mapping[str, _Sums]) -> tuple[BlockDifference, ...]:
    by_block: dict[str, _Sums] = {}
    for name, own in sums.items():
        by_block.setdefault(blocks.block_of(name), _Sums()).add(own)
    ordered = [(block, by_block[block]) for block in blocks.in_order(by_block)]
    return tuple(
        BlockDifference(block, own.over_base(own.current), own.over_base(own.new), own.cosine) for block, own in ordered
    )
