"""float8_e4m3fn with a float32 scale: of the whole matrix (comfy-kitchen, ComfyUI) or of each row (diffusers).

A scale of the whole is a power of two by default: readers multiply in the dtype that they compute in, which rounds any
other and makes a whole layer stronger or weaker. Rounding is to nearest, or up and down by chance: then errors of many
values cancel, which they do not where a LoRA moves each by less than half a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable
from lora_fuse.quantisation.int8 import row_scales
from lora_fuse.quantisation.values import Float32s, row_maxima

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_ROW_SCALE = 1e-12  # diffusers' own, `quantize_fp8r`


@dataclass(frozen=True, slots=True)
class Fp8Options:
    """The scale of a matrix, a power of two or its largest value over 448; the seed of rounding by chance, or None."""

    power_of_two: bool = True
    seed: int | None = None


NEAREST = Fp8Options()


def encode(matrix: Float32s, options: Fp8Options = NEAREST) -> dict[str, npt.NDArray[np.generic]]:
    """Codes float8_e4m3fn ``(N, K)`` and a scale float32 ``()`` of a float32 matrix.

    Raises:
        Unquantisable: see `row_maxima`.
    """
    from lora_fuse.quantisation.kernels import e4m3_rows, e4m3_rows_at_random

    top = row_maxima(matrix).max()
    scale = _power_of_two(float(top)) if options.power_of_two else np.float32(top / np.float32(LARGEST))
    scales = np.full(len(matrix), max(scale, np.finfo(np.float32).tiny), np.float32)
    codes = np.empty(matrix.shape, np.uint8)
    values = np.ascontiguousarray(matrix)
    if options.seed is None:
        e4m3_rows(values, scales, codes)
    else:
        e4m3_rows_at_random(values, scales, codes, np.uint64(options.seed % 2**64))
    return {"weight": codes.view(_e4m3fn()), "weight_scale": np.array(scales[0])}


def encode_rows(matrix: Float32s) -> dict[str, npt.NDArray[np.generic]]:
    """Codes float8_e4m3fn ``(N, K)`` and scales float32 ``(N,)`` of a float32 matrix.

    Raises:
        Unquantisable: see `row_maxima`.
    """
    from lora_fuse.quantisation.kernels import e4m3_divided_rows

    scales = np.maximum(row_maxima(matrix) / np.float32(LARGEST), np.float32(SMALLEST_ROW_SCALE))
    codes = np.empty(matrix.shape, np.uint8)
    e4m3_divided_rows(np.ascontiguousarray(matrix), scales, codes)
    return {"weight": codes.view(_e4m3fn()), "weight_scale": scales}


def decode(weight: npt.NDArray[np.generic], scale: npt.NDArray[np.generic] | None) -> Float32s:
    """Values of float8 codes ``(N, K)``, any float8 of ml_dtypes, by their scale, one or one a row; None is 1.

    Raises:
        Unquantisable: the scales are not as many; see `row_scales`.
    """
    from lora_fuse.quantisation.kernels import looked_up

    one = np.ones(1, np.float32) if scale is None else scale
    out = np.empty(weight.shape, np.float32)
    codes = np.ascontiguousarray(weight).view(np.uint8)
    if codes.ndim != 2:
        raise Unquantisable(f"it is {list(weight.shape)}, and a matrix is read")
    looked_up(codes, values_of(weight.dtype.name), row_scales(one, len(weight))[:, None], out)
    return out


@cache
def values_of(dtype: str) -> Float32s:
    """The 256 values of a dtype of 8 bits, by its name in ml_dtypes, float32 ``(256,)``."""
    import ml_dtypes  # noqa: F401 - registers them

    values: Float32s = np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float32)
    return values


def _power_of_two(top: float) -> np.float32:
    """The smallest power of two by which a value is at most 448."""
    fraction, exponent = math.frexp(top / LARGEST)
    return np.float32(math.ldexp(1.0, exponent - (fraction == 0.5)))


def _e4m3fn() -> np.dtype[np.generic]:
    import ml_dtypes  # noqa: F401 - registers it

    return np.dtype("float8_e4m3fn")
