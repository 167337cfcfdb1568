"""Codes as the values that they stand for, float32, some rows at a time: ``code * scale``, one rounding.

A rotated matrix is turned back on its codes, in whole numbers, before they are scaled; so that too is rounded once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint.stored.containers import StoredMatrix
from lora_fuse.checkpoint.stored.ggml_blocks import DECODERS
from lora_fuse.checkpoint.stored.gguf_file import BY_NAME

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")  # ComfyUI's names, and ml_dtypes'


def decode_rows(matrix: StoredMatrix, codes: Bytes, first: int) -> Float32:
    """The values of rows, (n, columns), from the bytes of their codes; `first` is the number of the first."""
    rows = len(codes) * matrix.shape[0] // matrix.codes.tensor.nbytes
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # who reads them looks at what is no number
        return _decoded(matrix, codes, first, rows)


def _decoded(matrix: StoredMatrix, codes: Bytes, first: int, rows: int) -> Float32:
    if matrix.format in BY_NAME:
        kind = BY_NAME[matrix.format]
        return DECODERS[matrix.format](codes.reshape(-1, kind.nbytes)).reshape(rows, -1)
    values: Float32
    if matrix.format in _FLOAT8:
        import ml_dtypes

        values = codes.view(np.dtype(getattr(ml_dtypes, matrix.format))).astype(np.float32)
    else:
        values = codes.view(np.int8).astype(np.float32)
    values = values.reshape(rows, -1)
    if matrix.group:
        values = rotate(values, matrix.group)
    if matrix.scales is None:
        return values
    return values * (matrix.scales[first : first + rows] if matrix.scales.ndim else matrix.scales)


def rotate(values: Float32, group: int) -> Float32:
    """Rows of whole numbers times the Kronecker power of Hadamard's matrix, over the square root of its size.

    Sums of `group` numbers of 8 bits are exact in float32, and the root is a power of two.
    """
    parts = values.reshape(-1, group)
    step = 1
    while step < group:
        a, b, c, d = np.moveaxis(parts.reshape(len(parts), -1, 4, step), 2, 0)
        columns = [a + b + c - d, a + b - c + d, a - b + c + d, b + c + d - a]
        parts = np.stack(columns, axis=2).reshape(len(parts), group)
        step *= 4
    return (parts * np.float32(1 / np.sqrt(group))).reshape(values.shape)
