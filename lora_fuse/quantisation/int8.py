"""int8 with one float32 scale a row, of weights that are rotated first, so that outliers do not set the scale.

By comfy-kitchen 0.2.40, `quantize_int8_convrot_weight`: each group of 256 columns is multiplied by a regular Hadamard
matrix. The reader rotates its activations in the same way. Where 256 does not divide the columns, the largest of
`GROUPS` that does is taken; a container says it layer by layer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable
from lora_fuse.quantisation.values import Float32s, row_maxima

GROUPS = (256, 64, 16, 4)
LARGEST = 2.0**122  # each of four steps doubles a value at most, and so does the sum in it


def group_of(columns: int) -> int:
    """The size of a group.

    Raises:
        Unquantisable: no size divides the columns.
    """
    for group in GROUPS:
        if columns % group == 0:
            return group
    raise Unquantisable(f"it has {columns} columns, and no group of {', '.join(map(str, GROUPS))} divides them")


def encode(matrix: Float32s) -> dict[str, npt.NDArray[np.generic]]:
    """Codes int8 ``(N, K)`` and scales float32 ``(N, 1)`` of a float32 matrix.

    Raises:
        Unquantisable: see `group_of` and `row_maxima`; or a value is too large to be rotated.
    """
    from lora_fuse.quantisation.kernels import int8_rows

    group = group_of(matrix.shape[-1])
    if row_maxima(matrix).max() > LARGEST:
        raise Unquantisable("a value is too large for float32 when it is rotated")
    codes = np.empty(matrix.shape, np.int8)
    scales = np.empty((len(matrix), 1), np.float32)
    int8_rows(np.ascontiguousarray(matrix), group, codes, scales[:, 0])
    return {"weight": codes, "weight_scale": scales}


def decode(weight: npt.NDArray[np.int8], scale: Float32s, group: int | None) -> Float32s:
    """Values of codes ``(N, K)`` by their scale, one or one a row; `group` is of the rotation, None without.

    Raises:
        Unquantisable: the scales are not as many, or the group does not divide the columns or is no power of 4.
    """
    from lora_fuse.quantisation.kernels import int8_values

    size = 1 if group is None else group
    if size not in {4**power for power in range(13)} or weight.shape[1] % size:
        raise Unquantisable(f"a rotation in groups of {group} is not possible for {weight.shape[1]} columns")
    out = np.empty(weight.shape, np.float32)
    int8_values(np.ascontiguousarray(weight), row_scales(scale, len(weight)), size, out)
    return out


def row_scales(scale: npt.NDArray[np.generic], rows: int) -> Float32s:
    """One float32 scale a row, of one for all or one a row.

    Raises:
        Unquantisable: they are of another number.
    """
    if scale.size not in (1, rows):
        raise Unquantisable(f"it has {scale.size} scales for {rows} rows, and 1 or {rows} are read")
    return np.ascontiguousarray(np.broadcast_to(scale.astype(np.float32).reshape(-1), (rows,)))
