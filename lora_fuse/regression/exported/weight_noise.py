"""Weights that an export gives back, against those that were meant: numbers of one tensor, and of all. Pure arrays.

A quantised weight is ``q = W + D + e``: the base, the LoRA's delta, and an error. A format that loses nothing has no
``e``; one that loses the LoRA has ``e = -D``, whatever its log says. So that both show, ``q - W`` is held against `D`.
All sums are of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]

BLOCK = 1 << 21  # values that are widened at a time


@dataclass(frozen=True, slots=True)
class TensorNoise:
    """Energies (sums of squares) of one tensor, and what is worked out of them.

    Attributes:
        meant: of what was meant, ``x = W + D``.
        error: of ``q - x``.
        update: of ``D``; 0 for a tensor that no LoRA changes.
        realised: of ``q - W``.
        overlap: the inner product of ``q - W`` and ``D``.
        best: of ``Q(x) - x``, the error of the format itself; None where it is not known, or the tensor is kept.
        apart: of ``q - Q(x)``.
        changed: values of a tensor that the format keeps which are not the merged ones; None if it is quantised.
        nonfinite: values that are NaN or infinite.
    """

    name: str
    values: int
    meant: float
    error: float
    update: float = 0.0
    realised: float = 0.0
    overlap: float = 0.0
    best: float | None = None
    apart: float = 0.0
    changed: int | None = None
    nonfinite: int = 0

    @property
    def relative_l2(self) -> float:
        """``|q - x| / |x|``."""
        return _root_of_ratio(self.error, self.meant)

    @property
    def from_best(self) -> float | None:
        """``|q - Q(x)| / |Q(x) - x|``: 0 if `x` was quantised, once; noise that hides a wrong scale is in both."""
        return None if self.best is None else _root_of_ratio(self.apart, self.best)


def tensor_noise(
    name: str,
    decoded: FloatArray,
    meant: FloatArray,
    *,
    base: FloatArray | None = None,
    best: FloatArray | None = None,
) -> TensorNoise:
    """Measure a tensor that the format quantises; all arrays have its shape.

    `base` is ``W`` of a target, `best` what the format's own encoder and decoder make of `meant`.
    """
    nonfinite = int((~np.isfinite(decoded)).sum())
    parts = [_energies(*arrays) for arrays in _blocks(decoded, meant, base, best)]
    of_meant, error, update, realised, overlap, of_best, apart = np.array(parts).sum(axis=0).tolist()
    return TensorNoise(
        name,
        decoded.size,
        of_meant,
        error,
        update,
        realised,
        overlap,
        best=None if best is None else of_best,
        apart=apart,
        nonfinite=nonfinite,
    )


def _blocks(*arrays: FloatArray | None) -> Iterator[list[Any]]:
    """The same rows of all arrays at a time, in float64: a whole matrix of a large model would take gigabytes."""
    flat = [None if array is None else array.reshape(1 if array.ndim < 2 else len(array), -1) for array in arrays]
    rows, columns = next(array.shape for array in flat if array is not None)
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield [None if array is None else array[start : start + step].astype(np.float64) for array in flat]


def _energies(
    decoded: npt.NDArray[np.float64],
    meant: npt.NDArray[np.float64],
    base: npt.NDArray[np.float64] | None,
    best: npt.NDArray[np.float64] | None,
) -> tuple[float, ...]:
    """Energies of some rows: meant, error, update, realised, overlap, best, apart."""
    with np.errstate(all="ignore"):
        update = realised = overlap = of_best = apart = 0.0
        if base is not None:
            delta = meant - base
            real = decoded - base
            update = _energy(delta)
            realised = _energy(real)
            overlap = float(np.einsum("ij,ij->", real, delta))
        if best is not None:
            of_best = _energy(best - meant)
            apart = _energy(decoded - best)
        return _energy(meant), _energy(decoded - meant), update, realised, overlap, of_best, apart


def kept_noise(name: str, decoded: FloatArray, merged: FloatArray) -> TensorNoise:
    """Measure a tensor that the format is to keep: as it is in the merge, to the last bit."""
    if decoded.shape != merged.shape:
        return TensorNoise(name, decoded.size, 1.0, math.inf, changed=decoded.size)
    nonfinite = int((~np.isfinite(decoded)).sum())
    changed = int((decoded != merged).sum())
    parts = [_energies(*arrays) for arrays in _blocks(decoded, merged, None, None)]
    meant, error = np.array(parts).sum(axis=0)[:2].tolist()
    return TensorNoise(name, decoded.size, meant, error, changed=changed, nonfinite=nonfinite)


@dataclass(frozen=True, slots=True)
class WeightNoise:
    """All tensors of an export. Ratios of all are of sums, so that large matrices count as much as they are."""

    tensors: tuple[TensorNoise, ...]

    @property
    def quantised(self) -> Sequence[TensorNoise]:
        """The tensors that the format quantises."""
        return [tensor for tensor in self.tensors if tensor.changed is None]

    @property
    def targets(self) -> Sequence[TensorNoise]:
        """The quantised tensors that a LoRA changes."""
        return [tensor for tensor in self.quantised if tensor.update > 0]

    @property
    def relative_l2(self) -> float:
        """``|q - x| / |x|`` of all tensors as one vector."""
        return _root_of_ratio(sum(t.error for t in self.tensors), sum(t.meant for t in self.tensors))

    @property
    def noise(self) -> float | None:
        """Energy of the error over that of the update, of all quantised targets; None without any."""
        update = sum(t.update for t in self.targets)
        return sum(t.error for t in self.targets) / update if update else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the realised and the meant update, of all quantised targets: lower with more noise."""
        realised, update, overlap = (
            sum(getattr(t, name) for t in self.targets) for name in ("realised", "update", "overlap")
        )
        return overlap / math.sqrt(realised * update) if realised * update > 0 else (0.0 if update else None)

    @property
    def kept(self) -> float | None:
        """The share of the LoRA that is left, ``<q - W, D> / <D, D>``: 1, whatever the noise; 0 where it is lost."""
        update = sum(t.update for t in self.targets)
        return sum(t.overlap for t in self.targets) / update if update else None

    @property
    def nonfinite(self) -> int:
        """Values that are NaN or infinite."""
        return sum(tensor.nonfinite for tensor in self.tensors)

    def worst(self, measure: str) -> TensorNoise | None:
        """The quantised tensor with the largest `measure`, the name of a number of `TensorNoise`."""
        measured = [tensor for tensor in self.quantised if getattr(tensor, measure) is not None]
        return max(measured, key=lambda tensor: _order(getattr(tensor, measure)), default=None)


def _energy(values: npt.NDArray[np.float64]) -> float:
    return float(np.square(values).sum())


def _ratio(one: float, other: float) -> float:
    return one / other if other else (0.0 if not one else math.inf)


def _root_of_ratio(one: float, other: float) -> float:
    ratio = _ratio(one, other)
    return math.sqrt(ratio) if ratio >= 0 else math.nan


def _order(number: float) -> float:
    """A key that puts NaN last: it is worse than every number."""
    return math.inf if math.isnan(number) else number
