"""Values quantised again as a weight was stored: the same format, the same kind of scale, a new scale of their own.

Element-wise operations in float32 only, in one order, so that the same bytes come out on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint.stored.containers import StoredMatrix
from lora_fuse.checkpoint.stored.decoding import rotate
from lora_fuse.errors import Unquantisable
from lora_fuse.quantisation import FORMATS, Fp8Options

Float32: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
LARGEST_INT8 = np.float32(127)
SMALLEST_SCALE = np.float32(1e-30)  # of int8, as comfy-kitchen has it
BLOCK = 1 << 20  # values that are worked on at a time
MADE = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "Q8_0")  # formats that are written, not only read


def encode(matrix: StoredMatrix, values: Float32) -> tuple[StoredMatrix, Bytes]:
    """Quantise values (rows, columns): the matrix with its new scales, and the bytes of its codes.

    Raises:
        Unquantisable: the format cannot hold them, or is one that is only read.
    """
    if matrix.format not in MADE:
        raise Unquantisable(f"{matrix.format} is read here and not written")
    if not np.isfinite(values).all():
        raise Unquantisable("a value is NaN or infinite")
    if matrix.format == "Q8_0":
        codes = FORMATS["q8_0"].encode(values, Fp8Options())["weight"]
        return matrix, codes.view(np.uint8).reshape(-1)
    if matrix.scales is None:
        return matrix, _float8(matrix.format, values).reshape(-1)
    if matrix.format == "int8_tensorwise":
        return _int8(matrix, values)
    return _scaled_float8(matrix, values)


def _float8(kind: str, values: Float32) -> Bytes:
    import ml_dtypes

    dtype = getattr(ml_dtypes, kind)
    largest = float(ml_dtypes.finfo(dtype).max)
    if (top := float(np.abs(values).max(initial=0))) > largest:
        raise Unquantisable(f"a value of {top:.4g} is larger than {kind} goes without a scale, {largest:g}")
    return np.asarray(values.astype(dtype)).view(np.uint8)


def _int8(matrix: StoredMatrix, values: Float32) -> tuple[StoredMatrix, Bytes]:
    def turned(rows: slice) -> Float32:
        return rotate(values[rows], matrix.group) if matrix.group else values[rows]

    scales = np.maximum(_tops(matrix, turned) / LARGEST_INT8, SMALLEST_SCALE)
    codes = np.empty(values.shape, np.int8)
    for rows in _blocks(values.shape):
        codes[rows] = np.rint(turned(rows) / _of_rows(scales, rows)).astype(np.int8)
    return replace(matrix, scales=scales), codes.view(np.uint8).reshape(-1)


def _scaled_float8(matrix: StoredMatrix, values: Float32) -> tuple[StoredMatrix, Bytes]:
    """Codes of float8 whose largest is the format's largest number, or half of it at least where scales are powers."""
    import ml_dtypes

    largest = np.float32(ml_dtypes.finfo(getattr(ml_dtypes, matrix.format)).max)
    scales = np.maximum(_tops(matrix, lambda rows: values[rows]) / largest, SMALLEST_SCALE)
    if _are_powers(matrix.scales):
        fraction, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    codes = np.empty(values.shape, np.uint8)
    for rows in _blocks(values.shape):
        codes[rows] = _float8(matrix.format, np.clip(values[rows] / _of_rows(scales, rows), -largest, largest))
    return replace(matrix, scales=scales), codes.reshape(-1)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Runs of rows that are small beside a matrix."""
    step = max(1, BLOCK // shape[1])
    for first in range(0, shape[0], step):
        yield slice(first, first + step)


def _of_rows(scales: Float32, rows: slice) -> Float32:
    return scales[rows] if scales.ndim else scales


def _tops(matrix: StoredMatrix, values: Callable[[slice], Float32]) -> Float32:
    """The largest absolute value of each row, or of all: as many as the matrix had scales."""
    tops = [np.abs(values(rows)).max(axis=1, keepdims=True) for rows in _blocks(matrix.shape)]
    by_row = matrix.scales is not None and matrix.scales.ndim > 0
    return np.asarray(np.concatenate(tops) if by_row else np.concatenate(tops).max(), np.float32)


def _are_powers(scales: Float32 | None) -> bool:
    """True where all are powers of two, which readers decode exactly in any dtype."""
    return scales is not None and all(math.frexp(scale)[0] == 0.5 for scale in scales.reshape(-1).tolist())
