"""Matrices of weights, the same on every machine."""

import numpy as np
import numpy.typing as npt

SHAPE = (48, 512)
Float32s = npt.NDArray[np.float32]


def matrix(kind: str = "normal", shape: tuple[int, int] = SHAPE, seed: int = 1) -> Float32s:
    """Weights of a layer's size; `outliers` has columns that are a hundred times as large."""
    values = np.random.Generator(np.random.Philox(seed)).integers(-(2**15), 2**15, (4, *shape)).sum(0)  # nearly normal
    made: Float32s = (values * 2.0**-21).astype(np.float32)
    if kind == "outliers":
        made[:, ::97] *= np.float32(100)
    return made
