"""Small floats with a scale for each block of columns: mxfp8 (OCP MX: e4m3 and E8M0 for 32) and nvfp4 (e2m1, e4m3, 16).

By comfy-kitchen 0.2.40, `quantize_mxfp8` and `quantize_nvfp4`: rows and columns are padded with zeros to a block's
size, and the scales are in tiles (`swizzle`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable
from lora_fuse.quantisation.fp8 import values_of
from lora_fuse.quantisation.swizzle import padded, swizzled, unswizzled
from lora_fuse.quantisation.values import Float32s, row_maxima

MX_BLOCK = 32
NV_BLOCK = 16
LARGEST_OF_NV = 448.0 * 6.0  # the largest scale times the largest code


def encode_mxfp8(matrix: Float32s) -> dict[str, npt.NDArray[np.generic]]:
    """Codes float8_e4m3fn, padded, and exponents float8_e8m0fnu in tiles, of a float32 matrix.

    Raises:
        Unquantisable: see `row_maxima`.
    """
    import ml_dtypes

    from lora_fuse.quantisation.kernels import mxfp8_rows

    row_maxima(matrix)
    whole = _padded(matrix, MX_BLOCK)
    codes = np.empty(whole.shape, np.uint8)
    exponents = np.empty((len(whole), whole.shape[1] // MX_BLOCK), np.uint8)
    mxfp8_rows(whole, exponents, codes)
    scales = swizzled(exponents).view(ml_dtypes.float8_e8m0fnu)
    return {"weight": codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": scales}


def decode_mxfp8(
    weight: npt.NDArray[np.generic], scale: npt.NDArray[np.generic], shape: tuple[int, int] | None = None
) -> Float32s:
    """Values of codes and exponents, cut to a shape.

    Raises:
        Unquantisable: the arrays do not belong together.
    """
    from lora_fuse.quantisation.kernels import looked_up

    rows, columns = _of_blocks(weight.shape, MX_BLOCK)
    exponents = unswizzled(scale.view(np.uint8), rows, columns // MX_BLOCK)
    scales = (exponents.astype(np.uint32) << 23).view(np.float32)  # an exponent of 0 is of a block of zeros
    out = np.empty((rows, columns), np.float32)
    looked_up(np.ascontiguousarray(weight).view(np.uint8), values_of("float8_e4m3fn"), scales, out)
    return _cut(out, shape)


def encode_nvfp4(matrix: Float32s) -> dict[str, npt.NDArray[np.generic]]:
    """Codes, two in a uint8, padded; their scales float8_e4m3fn in tiles; and a scale of all, of a float32 matrix.

    Raises:
        Unquantisable: see `row_maxima`.
    """
    import ml_dtypes

    from lora_fuse.quantisation.kernels import nvfp4_rows

    top = row_maxima(matrix).max()
    whole = _padded(matrix, NV_BLOCK)
    of_all = np.float32(top / np.float32(LARGEST_OF_NV))
    codes = np.empty((len(whole), whole.shape[1] // 2), np.uint8)
    scales = np.empty((len(whole), whole.shape[1] // NV_BLOCK), np.uint8)
    nvfp4_rows(whole, max(of_all, np.finfo(np.float32).tiny), scales, codes)
    return {
        "weight": codes,
        "weight_scale": swizzled(scales).view(ml_dtypes.float8_e4m3fn),
        "weight_scale_2": np.array(of_all),
    }


def decode_nvfp4(
    weight: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.generic],
    of_all: npt.NDArray[np.generic],
    shape: tuple[int, int] | None = None,
) -> Float32s:
    """Values of codes, their scales and the scale of all, cut to a shape.

    Raises:
        Unquantisable: the arrays do not belong together.
    """
    from lora_fuse.quantisation.kernels import looked_up

    rows, columns = _of_blocks((weight.shape[0], 2 * weight.shape[-1]), NV_BLOCK)
    codes = np.empty((rows, columns), np.uint8)
    codes[:, 0::2] = weight >> 4
    codes[:, 1::2] = weight & 15
    blocks = unswizzled(scale.view(np.uint8), rows, columns // NV_BLOCK)
    scales = values_of("float8_e4m3fn")[blocks] * np.float32(of_all.reshape(-1)[0])
    out = np.empty((rows, columns), np.float32)
    looked_up(codes, _e2m1_values(), scales, out)
    return _cut(out, shape)


def padded_shape(shape: tuple[int, int], block: int) -> tuple[int, int]:
    """The shape of a matrix with zeros to whole blocks, in rows as in columns."""
    return padded(shape[0], block), padded(shape[1], block)


def _e2m1_values() -> Float32s:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([values, -values])


def _padded(matrix: Float32s, block: int) -> Float32s:
    shape = padded_shape((matrix.shape[0], matrix.shape[1]), block)
    if shape == matrix.shape:
        return np.ascontiguousarray(matrix)
    whole = np.zeros(shape, np.float32)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole


def _of_blocks(shape: tuple[int, ...], block: int) -> tuple[int, int]:
    if len(shape) != 2 or shape[1] % block:
        raise Unquantisable(f"it is {list(shape)}, and rows of whole blocks of {block} are read")
    return shape[0], shape[1]


def _cut(values: Float32s, shape: tuple[int, int] | None) -> Float32s:
    if shape is None:
        return values
    if shape[0] > values.shape[0] or shape[1] > values.shape[1]:
        raise Unquantisable(f"it is {list(values.shape)}, and {list(shape)} is expected")
    return np.ascontiguousarray(values[: shape[0], : shape[1]])
