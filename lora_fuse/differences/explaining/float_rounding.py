"""Rounding to floats of a checkpoint's dtype, done in float64 arrays, and the distance of neighbours. Pure.

A number is rounded to nearest, ties to even, to so many bits; below the smallest normal number the last bit stays where
it is (IEEE 754, sections 3.3 and 4.3.1). float64 holds every value of the formats that are narrower.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes

Array = npt.NDArray[np.float64]

MANTISSA = 52  # bits of a float64 behind its exponent
BIAS = 1023  # of that exponent

FORMATS = {name: kind for name, kind in dtypes.ROUNDABLE.items() if name != "F64"}


def spacing(values: Array, kind: dtypes.FloatFormat) -> Array:
    """Distance of two neighbours of a format where each value lies: a power of two, made of float64's own bits."""
    exponent = (np.ascontiguousarray(values).view(np.int64) >> MANTISSA) & (2 * BIAS + 1)
    lowest = np.maximum(exponent, BIAS + 1 - kind.bias) + (1 - kind.precision)
    return np.asarray((lowest << MANTISSA).view(np.float64))


def rounded(values: Array, kind: dtypes.FloatFormat) -> Array:
    """The nearest number of a format to each value, as float64; too large ones are infinite."""
    unit = spacing(values, kind)
    near = np.rint(values / unit) * unit
    near[np.abs(near) > kind.largest] *= np.inf
    return np.asarray(near)


def in_float32(values: Array) -> Array:
    """The nearest float32 to each value, as float64."""
    return values.astype(np.float32).astype(np.float64)


def intervals(values: Array, kind: dtypes.FloatFormat) -> tuple[Array, Array]:
    """The reals that are rounded to each number of a format: between the middles to its two neighbours.

    Below a power of two the neighbour is half as far.
    """
    size = np.abs(values)
    outer = spacing(size, kind) / 2
    is_power = (size.view(np.int64) & ((1 << MANTISSA) - 1) == 0) & (size > kind.smallest_normal)
    inner = np.where(is_power, outer / 2, outer)
    low = np.where(values > 0, values - inner, values - outer)
    high = np.where(values < 0, values + inner, values + outer)
    return low, high
