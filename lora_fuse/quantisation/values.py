"""Refusal of what no format can hold: numbers that are none, and rows of zeros."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable

Float32s: TypeAlias = npt.NDArray[np.float32]
INFINITE = 0x7F800000  # the bits of a float32's infinity; NaN lie above


def row_maxima(matrix: Float32s) -> Float32s:
    """The largest absolute value of each row of a float32 matrix ``(N, K)``, ``(N,)``.

    Raises:
        Unquantisable: the matrix is none, a value is no finite number, or a row has nothing but zeros, as a file has
            whose writer died.
    """
    from lora_fuse.quantisation.kernels import largest_magnitudes

    if matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.size:
        raise Unquantisable(f"it is {matrix.dtype} {list(matrix.shape)}, and a float32 matrix is quantised")
    found = np.empty(matrix.shape[0], np.uint32)
    largest_magnitudes(np.ascontiguousarray(matrix).view(np.uint32), found)
    for bad, what in ((found >= INFINITE, "has a value that is NaN or infinite"), (found == 0, "is all zero")):
        if bad.any():
            raise Unquantisable(f"its row {int(bad.argmax())} {what} ({int(bad.sum())} of {len(found)} rows)")
    return found.view(np.float32)
