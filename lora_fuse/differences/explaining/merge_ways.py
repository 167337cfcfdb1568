"""The ways in which programs add LoRAs to weights, each as the numbers that it would have written. Pure.

Every program means ``W + sum_i s_i D_i``; they differ in what they round on the way. So the numbers in a checkpoint say
who made it: each way is worked out in float64 and rounded where that program rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes
from lora_fuse.differences.explaining.float_rounding import FORMATS, in_float32, intervals, rounded

Array = npt.NDArray[np.float64]
Scales = Sequence[float] | Array


@dataclass(frozen=True, slots=True)
class Summands:
    """Values of some weights of the base, float64 of any shape, and by LoRA what each adds to them at scale 1.

    `coarse` are the same deltas made of factors that are in the checkpoint's dtype; as `deltas` where it is not known.
    """

    weights: Array
    deltas: Sequence[Array]
    coarse: Sequence[Array]

    def part(self, where: npt.NDArray[np.bool_]) -> Summands:
        """The values at some places, flat."""
        return Summands(self.weights[where], [one[where] for one in self.deltas], [one[where] for one in self.coarse])

    def total(self, scales: Scales) -> Array:
        """The sum, not rounded to the checkpoint's dtype."""
        total = self.weights.copy()
        for scale, delta in zip(scales, self.deltas, strict=True):
            if scale:
                total += scale * delta
        return total


SLACK = 1e-6  # of the distance of two neighbours: float64 has the sum to less
Maker = Callable[[Summands, Scales, dtypes.FloatFormat, Sequence[int]], Array]


@dataclass(frozen=True, slots=True)
class MergeWay:
    """A way to merge: `key` for programs, `words` for people.

    `ordered` is one in which the order of LoRAs shows, `is_coarse` one for which a LoRA's factors are rounded first.
    """

    key: str
    words: str
    make: Maker
    ordered: bool = False
    is_coarse: bool = False

    @property
    def is_exact(self) -> bool:
        """True where the values do not depend on the order of sums."""
        return self.make is not _float32

    def comes_out(
        self, summands: Summands, scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int], values: Array
    ) -> npt.NDArray[np.bool_]:
        """True for each value that this way makes.

        Of an exact sum, which float64 has nearly, it is the nearest; of a float32 sum it may be that of any order.
        """
        if self.make not in (_once, _float32):
            return np.asarray(self.make(summands, scales, kind, order) == values)
        low, high = intervals(values, kind)
        total = summands.total(scales)
        slack = SLACK * (high - low)
        if self.make is _float32:
            parts = [abs(scale) * np.abs(delta) for scale, delta in zip(scales, summands.deltas, strict=True) if scale]
            slack += 2.0**-23 * np.abs(total) + 2.0**-20 * sum(parts, np.zeros_like(total))
        return np.asarray((total >= low - slack) & (total <= high + slack))


def _once(summands: Summands, scales: Scales, kind: dtypes.FloatFormat, _: Sequence[int]) -> Array:
    return rounded(summands.total(scales), kind)


def _float32(summands: Summands, scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int]) -> Array:
    total = in_float32(summands.weights)
    for number in order:
        if scales[number]:
            total = in_float32(total + in_float32(scales[number] * in_float32(summands.deltas[number])))
    return rounded(total, kind)


def _float16(summands: Summands, scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int]) -> Array:
    half = FORMATS["F16"]
    total = rounded(summands.weights, half)
    for number in order:
        if scales[number]:
            delta = in_float32(scales[number] * in_float32(summands.deltas[number]))
            total = rounded(total + rounded(delta, half), half)
    return rounded(total, kind)


def _twice(summands: Summands, scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int]) -> Array:
    return _one_by_one(summands.weights, summands.deltas, scales, kind, order)


def _twice_coarse(summands: Summands, scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int]) -> Array:
    return _one_by_one(summands.weights, summands.coarse, scales, kind, order)


def _one_by_one(
    weights: Array, deltas: Sequence[Array], scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int]
) -> Array:
    total = rounded(weights, kind)
    for number in order:
        if scales[number]:
            delta = in_float32(scales[number] * in_float32(deltas[number]))
            total = rounded(total + rounded(delta, kind), kind)
    return total


def _thrice(summands: Summands, scales: Scales, kind: dtypes.FloatFormat, order: Sequence[int]) -> Array:
    total = rounded(summands.weights, kind)
    for number in order:
        if scales[number]:
            product = rounded(in_float32(summands.coarse[number]), kind)
            total = rounded(total + rounded(in_float32(scales[number] * product), kind), kind)
    return total


# The first that fits counts. Sources: diffusers 0.42 `fuse_lora`, which is PEFT's `Linear.merge` and
# `get_delta_weight` (peft/tuners/lora/layer.py): on a CPU the product is float32, on a GPU the weights' dtype.
# ComfyUI's `patch_weight_to_device` (comfy/model_patcher.py) with `calculate_weight` (comfy/lora.py): sums in float32,
# or in float16 where `lora_compute_dtype` (comfy/model_management.py) finds the GPU fit for it.
WAYS = (
    MergeWay("once", "rounded once", _once),
    MergeWay("float32", "summed in float32 and rounded, as ComfyUI does", _float32, ordered=True),
    MergeWay("twice", "rounded twice, as diffusers does", _twice, ordered=True),
    MergeWay(
        "twice-coarse",
        "rounded twice, with the LoRA's factors rounded before, as diffusers does",
        _twice_coarse,
        ordered=True,
        is_coarse=True,
    ),
    MergeWay("thrice", "rounded three times, as diffusers does on a GPU", _thrice, ordered=True, is_coarse=True),
    MergeWay("float16", "summed in float16, as ComfyUI does on a GPU", _float16, ordered=True),
)
