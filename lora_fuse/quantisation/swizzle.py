"""Scales of blocks as tensor cores read them: tiles of 128 rows by 4 (cuBLAS, "1D Block Scaling Factors Layout").

In a tile, row r of a column lies at ``(r % 32) * 16 + (r // 32) * 4``. What a tile lacks is zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable

Bytes = npt.NDArray[np.uint8]


def padded(count: int, multiple: int) -> int:
    """A count rounded up to a multiple."""
    return -(-count // multiple) * multiple


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of scales in whole tiles."""
    return padded(rows, 128), padded(columns, 4)


def swizzled(scales: Bytes) -> Bytes:
    """Scales ``(rows, columns)`` in tiles, as many as a matrix ``(rows to 128, columns to 4)`` has."""
    rows, columns = scales.shape
    shape = tiled_shape(rows, columns)
    whole = np.zeros(shape, np.uint8)
    whole[:rows, :columns] = scales
    tiles = whole.reshape(shape[0] // 128, 4, 32, shape[1] // 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(shape)


def unswizzled(scales: Bytes, rows: int, columns: int) -> Bytes:
    """Undo `swizzled`.

    Raises:
        Unquantisable: it is of another shape.
    """
    shape = tiled_shape(rows, columns)
    if scales.size != shape[0] * shape[1]:
        raise Unquantisable(f"it has {scales.size} scales, and {rows} rows of {columns} have {shape[0] * shape[1]}")
    tiles = np.ascontiguousarray(scales).reshape(shape[0] // 128, shape[1] // 4, 32, 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4).reshape(shape)[:rows, :columns])
