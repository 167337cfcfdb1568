"""ggml's Q8_0: blocks of 32 int8 with one float16 scale, as bytes (ggml-quants.c, `quantize_row_q8_0_ref`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable
from lora_fuse.quantisation.values import Float32s, row_maxima

BLOCK = 32  # values
BYTES = 34  # of a block: float16, then 32 int8


def columns_in_bytes(columns: int) -> int:
    """Bytes of a row.

    Raises:
        Unquantisable: the columns are no whole blocks.
    """
    if columns % BLOCK:
        raise Unquantisable(f"it has {columns} columns, and blocks of {BLOCK} do not divide them")
    return columns // BLOCK * BYTES


def encode(matrix: Float32s) -> dict[str, npt.NDArray[np.generic]]:
    """The blocks of a float32 matrix ``(N, K)``, uint8 ``(N, K / 32 * 34)``.

    Raises:
        Unquantisable: see `row_maxima`; or a scale is too large for float16.
    """
    from lora_fuse.quantisation.kernels import q8_0_rows

    top = float(row_maxima(matrix).max())
    width = columns_in_bytes(matrix.shape[1])
    if top > 127 * float(np.finfo(np.float16).max):
        raise Unquantisable(f"a value of {top:.3g} has a scale that is too large for float16")
    rows, columns = matrix.shape
    codes = np.empty(matrix.shape, np.int8)
    scales = np.empty((rows, columns // BLOCK), np.float32)
    q8_0_rows(np.ascontiguousarray(matrix), scales, codes)
    blocks = np.empty((rows, columns // BLOCK, BYTES), np.uint8)
    blocks[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
    blocks[..., 2:] = codes.view(np.uint8).reshape(rows, columns // BLOCK, BLOCK)
    return {"weight": blocks.reshape(rows, width)}


def decode(weight: npt.NDArray[np.uint8]) -> Float32s:
    """Values ``(N, K)`` of blocks, uint8 ``(N, K / 32 * 34)``.

    Raises:
        Unquantisable: they are no whole blocks.
    """
    if weight.ndim != 2 or weight.shape[1] % BYTES:
        raise Unquantisable(f"it is bytes {list(weight.shape)}, and blocks of Q8_0 are of {BYTES}")
    blocks = np.ascontiguousarray(weight).reshape(len(weight), -1, BYTES)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    values: Float32s = np.ascontiguousarray(blocks[..., 2:]).view(np.int8) * scales
    return values.reshape(len(weight), -1)
