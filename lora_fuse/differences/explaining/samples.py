"""Rows of the weights that LoRAs are for, in both checkpoints, with what each LoRA adds to them: as many as memory has.

What is held does not grow with the model: of more weights there are fewer rows each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.differences import PairedTensor, RowPiece
from lora_fuse.differences.explaining.float_rounding import FORMATS, rounded
from lora_fuse.differences.explaining.merge_ways import Summands
from lora_fuse.fusion import Plan, Target, read_deltas
from lora_fuse.lora import Delta, LowRank
from lora_fuse.machine import file_state

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

BUDGET = 1 << 20  # values of the base that are held at once


@dataclass(frozen=True, slots=True)
class TargetedTensor:
    """A weight of both checkpoints, and what LoRAs add to it; `loras` is the number of each of the target's deltas."""

    tensor: PairedTensor
    target: Target
    loras: tuple[int, ...]

    @property
    def kind(self) -> dtypes.FloatFormat | None:
        """The format that the checkpoint's values were rounded to; None of codes, and of float64."""
        return FORMATS.get(self.tensor.dtype or "")


@dataclass(frozen=True, slots=True)
class SampledTensor:
    """Some rows of a weight, flat: `values` are the checkpoint's, `summands` the base's and the LoRAs'."""

    name: str
    summands: Summands
    values: Array
    kind: dtypes.FloatFormat | None
    loras: frozenset[int]


class OpenedDeltas:
    """The deltas of one weight, whose factors are in memory."""

    def __init__(self, targeted: TargetedTensor, count: int) -> None:
        """Read the factors; `count` is the number of all LoRAs.

        Raises:
            BadLora: a LoRA cannot be read.
        """
        self._deltas = list(zip(targeted.loras, read_deltas(targeted.target), strict=True))
        self._coarse = [(number, _coarse(delta, targeted.kind)) for number, delta in self._deltas]
        self._count = count

    def summands(self, piece: RowPiece, rows: Rows | None = None, *, coarse: bool = True) -> Summands:
        """Take some rows of the base with what is added to them; `rows` are their numbers where they do not adjoin."""
        weights = piece.base.astype(np.float64)
        numbers = np.arange(piece.first, piece.first + len(weights)) if rows is None else rows
        none = np.broadcast_to(np.zeros(1), weights.shape)
        plain = [none] * self._count
        rough = [none] * self._count
        for (number, delta), (_, rounded_delta) in zip(self._deltas, self._coarse, strict=True):
            plain[number] = plain[number] + _rows_of(delta, weights, numbers)
            if coarse:
                same = rounded_delta is delta
                more = plain[number] if same else rough[number] + _rows_of(rounded_delta, weights, numbers)
                rough[number] = more
        return Summands(weights, plain, rough if coarse else plain)


def _coarse(delta: Delta, kind: dtypes.FloatFormat | None) -> Delta:
    """The delta whose factors are rounded to the checkpoint's dtype, as a library has them that loads them so."""
    if kind is None or not isinstance(delta, LowRank) or delta.matrix.b is None:
        return delta
    factors = [rounded(side, kind) for side in (delta.matrix.a, delta.matrix.b)]
    if all(np.array_equal(one, side) for one, side in zip(factors, (delta.matrix.a, delta.matrix.b), strict=True)):
        return delta
    return LowRank(type(delta.matrix)(*factors), delta.factor)


def _rows_of(delta: Delta, weights: Array, rows: Rows) -> Array:
    """Values of a delta in some rows, (n, columns), float64."""
    if isinstance(delta, LowRank) and delta.matrix.b is not None:
        return np.asarray((delta.matrix.a[rows] * delta.factor) @ delta.matrix.b)
    import torch

    total = np.zeros_like(weights)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(np.arange(len(rows)), breaks):
        part = torch.from_numpy(total[run[0] : run[-1] + 1])
        delta.add_to(part, torch.from_numpy(weights[run[0] : run[-1] + 1]), int(rows[run[0]]), 0)
    return total


def find_targets(plan: Plan, tensors: Sequence[PairedTensor]) -> dict[str, TargetedTensor]:
    """The weights that LoRAs are for, by name."""
    targets = {(one.shard.path, one.tensor.name): one for part in plan.parts for one in part.targets.values()}
    paths = [lora.path for lora in plan.loras]
    found = {}
    for tensor in tensors:
        target = targets.get((tensor.base.shard.path, tensor.base.tensor.name))
        if target is not None:
            loras = tuple(paths.index(scaled.lora.path) for scaled in target.deltas)
            found[tensor.name] = TargetedTensor(tensor, target, loras)
    return found


def take_samples(targets: Sequence[TargetedTensor], count: int, budget: int = BUDGET) -> list[SampledTensor]:
    """Read rows of every target, about `budget` values in all, the same in every run; side by side.

    Raises:
        BadCheckpoint, BadLora: a file cannot be read.
    """
    wanted = list(zip(targets, _row_numbers(targets, budget), strict=True))
    return file_state.in_threads(
        lambda pair, _: _sampled(*pair, count),
        wanted,
        lambda _: None,
        lambda pair: pair[0].tensor.columns * len(pair[1]),
    )


def _sampled(targeted: TargetedTensor, rows: Rows, count: int) -> SampledTensor:
    tensor = targeted.tensor
    piece = tensor.read(rows)
    summands = OpenedDeltas(targeted, count).summands(piece, rows)
    flat = summands.part(np.ones(summands.weights.shape, bool))
    values = piece.other.astype(np.float64).ravel()
    return SampledTensor(tensor.name, flat, values, targeted.kind, frozenset(targeted.loras))


def _row_numbers(targets: Sequence[TargetedTensor], budget: int) -> Iterator[Rows]:
    """Rows of each, in rising order; small weights leave their share to larger ones."""
    left = budget
    sizes = sorted(one.tensor.size for one in targets)
    share = budget
    for number, size in enumerate(sizes):
        share = left // (len(sizes) - number)
        if size > share:
            break
        left -= size
    for one in targets:
        fits = one.tensor.size <= share
        yield drawn(one.tensor, one.tensor.rows if fits else max(1, share // max(1, one.tensor.columns)))


def drawn(tensor: PairedTensor, count: int) -> Rows:
    """So many rows of a weight, the same in every run, in rising order."""
    if count >= tensor.rows:
        return np.arange(tensor.rows)
    draw = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    return np.sort(draw.choice(tensor.rows, size=count, replace=False))
