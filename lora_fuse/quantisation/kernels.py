"""The inner loops of the formats, compiled: each step is one IEEE operation in float32, in the order written.

Invariant: a row's codes depend on that row, the scales given and the place of its values alone, so the same bytes come
out on every machine and for any number of threads. Nothing is contracted or reassociated.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lora_fuse.quantisation.compiling import compiled

# numba widens what is not converted
F32 = np.float32
I8 = np.int8
I32 = np.int32
U8 = np.uint8
U32 = np.uint32
U64 = np.uint64
Float32s: TypeAlias = npt.NDArray[np.float32]
Int8s: TypeAlias = npt.NDArray[np.int8]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint32]

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but the sign
SMALLEST_SCALE = 1e-30  # of int8, as comfy-kitchen has it


@compiled()
def largest_magnitudes(bits: Words, out: Words) -> None:
    """Find the largest absolute value of each row, as bits: infinities and NaN lie above every number."""
    for i in range(bits.shape[0]):
        top = U32(0)
        for j in range(bits.shape[1]):
            top = max(top, U32(bits[i, j] & U32(MAGNITUDE)))
        out[i] = top


@compiled()
def _rotate(row: Float32s, group: int) -> None:
    """Multiply each group of a row by the regular Hadamard matrix of its size, a power of 4, in place.

    It is the Kronecker power of ``[[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2``, symmetric and its own inverse.
    """
    stride = 1
    half = F32(0.5)
    while stride < group:
        for start in range(0, row.shape[0], 4 * stride):
            part = row[start : start + 4 * stride]
            for at in range(stride):
                first = part[at]
                second = part[at + stride]
                third = part[at + 2 * stride]
                fourth = part[at + 3 * stride]
                front = F32(first + second)
                back = F32(third + fourth)
                front_difference = F32(first - second)
                back_difference = F32(third - fourth)
                part[at] = F32(F32(front + back_difference) * half)
                part[at + stride] = F32(F32(front - back_difference) * half)
                part[at + 2 * stride] = F32(F32(back + front_difference) * half)
                part[at + 3 * stride] = F32(F32(back - front_difference) * half)
        stride *= 4


@compiled()
def _top(values: Float32s) -> np.float32:
    """The largest absolute value."""
    top = F32(0)
    for j in range(values.shape[0]):
        top = max(top, F32(abs(values[j])))
    return top


@compiled()
def int8_rows(matrix: Float32s, group: int, codes: Int8s, scales: Float32s) -> None:
    """Rotate each row, and round it in units of its largest value over 127; a group of 1 rotates nothing."""
    row = np.empty(matrix.shape[1], F32)
    for i in range(matrix.shape[0]):
        for j in range(row.shape[0]):
            row[j] = matrix[i, j]
        _rotate(row, group)
        top = _top(row)
        scale = max(F32(top / F32(127)), F32(SMALLEST_SCALE))
        scales[i] = scale
        for j in range(row.shape[0]):
            codes[i, j] = I8(I32(np.rint(F32(row[j] / scale))))


@compiled()
def int8_values(codes: Int8s, scales: Float32s, group: int, out: Float32s) -> None:
    """Undo `int8_rows`; there is one scale a row."""
    for i in range(codes.shape[0]):
        row = out[i]
        scale = scales[i]
        for j in range(row.shape[0]):
            row[j] = F32(F32(codes[i, j]) * scale)
        _rotate(row, group)


@compiled()
def q8_0_rows(matrix: Float32s, scales: Float32s, codes: Int8s) -> None:
    """Round each 32 values in units of the largest over 127, ties away from zero (`quantize_row_q8_0`)."""
    for i in range(matrix.shape[0]):
        for block in range(scales.shape[1]):
            values = matrix[i, 32 * block : 32 * block + 32]
            top = _top(values)
            scale = F32(top / F32(127))
            scales[i, block] = scale
            inverse = F32(0)
            if scale > F32(3e-39):  # below, its inverse is infinite and the scale in float16 is 0
                inverse = F32(F32(1) / scale)
            for j in range(32):
                value = F32(values[j] * inverse)
                size = F32(abs(value))
                whole = F32(np.floor(size))
                rounded = F32(whole + F32(np.floor(F32(F32(2) * F32(size - whole)))))
                code = I32(rounded)
                codes[i, 32 * block + j] = I8(-code if value < F32(0) else code)


@compiled()
def _e4m3(value: np.float32) -> np.uint8:
    """The nearest float8_e4m3fn of a number of at most 448, ties to even, as its bits."""
    bits = F32(value).view(U32)
    magnitude = U32(bits & U32(MAGNITUDE))
    odd = U32(U32(magnitude >> U32(20)) & U32(1))
    normal = U32(U32(U32(magnitude + U32(0x7FFFF) + odd) >> U32(20)) - U32(960))  # 960: 120, of the biases, << 3
    subnormal = U32(I32(np.rint(F32(abs(value) * F32(512)))))  # their unit is 2**-9
    code = subnormal if magnitude < U32(0x3C800000) else normal  # 2**-6
    return U8(U32(code | U32(U32(bits >> U32(24)) & U32(0x80))))


@compiled()
def _random(counter: np.uint64) -> np.uint32:
    """The 20 highest bits of splitmix64's number of that index (Steele, Lea, Flood: Fast Splittable PRNGs, 2014)."""
    z = U64(U64(counter + U64(1)) * U64(0x9E3779B97F4A7C15))
    z = U64(U64(z ^ U64(z >> U64(30))) * U64(0xBF58476D1CE4E5B9))
    z = U64(U64(z ^ U64(z >> U64(27))) * U64(0x94D049BB133111EB))
    return U32(U64(z ^ U64(z >> U64(31))) >> U64(44))


@compiled()
def _e4m3_at_random(value: np.float32, random: np.uint32) -> np.uint8:
    """One of the two float8_e4m3fn around a number of at most 448: the further up it is, the more likely the upper."""
    bits = F32(value).view(U32)
    magnitude = U32(bits & U32(MAGNITUDE))
    normal = U32(U32(U32(magnitude + random) >> U32(20)) - U32(960))
    fixed = U32(I32(np.floor(F32(abs(value) * F32(2.0**29)))))  # below 2**-6: units of 2**-9 with 20 bits behind
    code = U32(U32(fixed + random) >> U32(20)) if magnitude < U32(0x3C800000) else normal
    return U8(U32(code | U32(U32(bits >> U32(24)) & U32(0x80))))


@compiled()
def e4m3_rows(matrix: Float32s, scales: Float32s, codes: Bytes) -> None:
    """Round values over their row's scale to nearest, as comfy-kitchen does for the inverse of a scale."""
    for i in range(matrix.shape[0]):
        inverse = F32(F32(1) / scales[i])
        for j in range(matrix.shape[1]):
            codes[i, j] = _e4m3(min(max(F32(matrix[i, j] * inverse), F32(-448)), F32(448)))


@compiled()
def e4m3_divided_rows(matrix: Float32s, scales: Float32s, codes: Bytes) -> None:
    """Round values divided by their row's scale to nearest, as diffusers does (`quantize_fp8r`)."""
    for i in range(matrix.shape[0]):
        scale = scales[i]
        for j in range(matrix.shape[1]):
            codes[i, j] = _e4m3(min(max(F32(matrix[i, j] / scale), F32(-448)), F32(448)))


@compiled()
def e4m3_rows_at_random(matrix: Float32s, scales: Float32s, codes: Bytes, seed: np.uint64) -> None:
    """Round values over their row's scale up or down by chance; a value's number depends on `seed` and its place."""
    columns = U64(matrix.shape[1])
    for i in range(matrix.shape[0]):
        inverse = F32(F32(1) / scales[i])
        first = U64(seed + U64(U64(i) * columns))
        for j in range(matrix.shape[1]):
            value = min(max(F32(matrix[i, j] * inverse), F32(-448)), F32(448))
            codes[i, j] = _e4m3_at_random(value, _random(U64(first + U64(j))))


@compiled()
def mxfp8_rows(matrix: Float32s, exponents: Bytes, codes: Bytes) -> None:
    """Round each 32 values in units of a power of two, the next from the largest over 448 on."""
    for i in range(matrix.shape[0]):
        for block in range(exponents.shape[1]):
            values = matrix[i, 32 * block : 32 * block + 32]
            top = _top(values)
            needed = F32(top / F32(448)).view(U32)
            exponent = U32(needed >> U32(23))
            if U32(needed & U32(0x7FFFFF)) != U32(0):
                exponent = U32(exponent + U32(1))
            exponent = max(exponent, U32(1))
            inverse = U32(U32(U32(254) - exponent) << U32(23)).view(F32)
            for j in range(32):
                codes[i, 32 * block + j] = _e4m3(F32(values[j] * inverse))
            exponents[i, block] = U8(exponent) if top > F32(0) else U8(0)


@compiled()
def _e4m3_value(code: np.uint8) -> np.float32:
    """The number that the bits of a float8_e4m3fn without a sign stand for."""
    if code < U8(8):
        return F32(F32(code) * F32(2.0**-9))
    return U32(U32(U32(code) + U32(960)) << U32(20)).view(F32)


@compiled()
def _e2m1(value: np.float32) -> np.uint8:
    """The nearest float4_e2m1fn of a number of at most 6, ties to even, as its bits."""
    bits = F32(value).view(U32)
    magnitude = U32(bits & U32(MAGNITUDE))
    odd = U32(U32(magnitude >> U32(22)) & U32(1))
    normal = U32(U32(U32(magnitude + U32(0x1FFFFF) + odd) >> U32(22)) - U32(252))  # 252: 126, of the biases, << 1
    subnormal = U32(I32(np.rint(F32(abs(value) * F32(2)))))
    code = subnormal if magnitude < U32(0x3F800000) else min(normal, U32(7))
    return U8(U32(code | U32(U32(bits >> U32(28)) & U32(8))))


@compiled()
def nvfp4_rows(matrix: Float32s, whole: np.float32, scales: Bytes, codes: Bytes) -> None:
    """Round each 16 values in units of an e4m3 scale times `whole`; of two codes the first is in the high nibble."""
    for i in range(matrix.shape[0]):
        for block in range(scales.shape[1]):
            values = matrix[i, 16 * block : 16 * block + 16]
            top = _top(values)
            code = _e4m3(min(F32(F32(top / F32(6)) / whole), F32(448)))
            scales[i, block] = code
            scale = F32(whole * _e4m3_value(code))
            for j in range(8):
                high = F32(0)
                low = F32(0)
                if scale > F32(0):
                    high = min(max(F32(values[2 * j] / scale), F32(-6)), F32(6))
                    low = min(max(F32(values[2 * j + 1] / scale), F32(-6)), F32(6))
                codes[i, 8 * block + j] = U8(U32(U32(_e2m1(high)) << U32(4)) | U32(_e2m1(low)))


@compiled()
def looked_up(codes: Bytes, table: Float32s, scales: Float32s, out: Float32s) -> None:
    """The values of 8-bit codes by a table, times a scale for each so many columns, ``(rows, columns / width)``."""
    width = codes.shape[1] // scales.shape[1]
    for i in range(codes.shape[0]):
        for block in range(scales.shape[1]):
            scale = scales[i, block]
            for j in range(block * width, block * width + width):
                out[i, j] = F32(table[codes[i, j]] * scale)
