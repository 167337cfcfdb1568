"""The dtypes of safetensors files, a row each: size, name elsewhere, and of a float the format to round sums to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary floating-point format: bits of the significand, the hidden one included, and of the exponent."""

    precision: int
    exponent_bits: int

    @property
    def bias(self) -> int:
        """The largest exponent, and what is added to one."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def smallest_normal(self) -> float:
        """Below it a number has fewer bits."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2 - 2.0 ** (1 - self.precision), self.bias)


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype: its name in a header, bits of a value, its name in numpy (with ml_dtypes) and in torch.

    `float_format` is None for integers, for complex numbers, and for floats of 8 bits or fewer: no sum is rounded to
    those, and tensors of them are carried as they are.
    """

    name: str
    bits: int
    array_name: str
    float_format: FloatFormat | None = None

    @property
    def is_float(self) -> bool:
        """True where a value is a floating-point number, or two of them."""
        return "F" in self.name or self.name.startswith("C")

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The dtype in numpy."""
        import ml_dtypes  # noqa: F401 - registers bfloat16 and the floats of 8 bits and fewer
        import numpy as np

        return np.dtype(self.array_name)

    @property
    def torch(self) -> torch.dtype:
        """The dtype in torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.array_name)
        return dtype


FLOAT32 = FloatFormat(24, 8)
DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F4", 4, "float4_e2m1fn"),
        DType("F6_E2M3", 6, "float6_e2m3fn"),
        DType("F6_E3M2", 6, "float6_e3m2fn"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16", FloatFormat(11, 5)),
        DType("BF16", 16, "bfloat16", FloatFormat(8, 8)),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32", FLOAT32),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
        DType("F64", 64, "float64", FloatFormat(53, 11)),
        DType("C64", 64, "complex64"),
    )
}
ROUNDABLE = {name: dtype.float_format for name, dtype in DTYPES.items() if dtype.float_format is not None}
# The dtypes that a merge can be written in, by the name that a configuration has.
OUTPUTS = {DTYPES[name].array_name: name for name in ("F16", "BF16", "F32")}
SIXTEEN_BIT = {name: kind for name, kind in ROUNDABLE.items() if DTYPES[name].bits == 16}
