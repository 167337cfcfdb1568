"""Blocks of ggml's quantised types as the values that they stand for, float32, one rounding a value. Pure.

Source: ggml/src/ggml-quants.c, `dequantize_row_q8_0`, `…_q4_K`, `…_q5_K`, `…_q6_K`, and the structs in ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def _half(blocks: Bytes, at: int) -> Float32:
    """The number of 16 bits that lies in each block at a byte, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _q8_0(blocks: Bytes) -> Float32:
    """34 bytes: a scale, 32 codes."""
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


def _scales_and_mins(packed: Bytes) -> tuple[Float32, Float32]:
    """The eight scales and minima, 6 bits each, of 12 bytes (`get_scale_min_k4`): (blocks, 8, 1) each."""
    low = packed[:, :4]
    high = packed[:, 4:8]
    rest = packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def _nibbles(packed: Bytes, width: int) -> Bytes:
    """Low nibbles of each run of `width` bytes, then the high ones: (blocks, runs * 2, width)."""
    runs = packed.reshape(len(packed), -1, 1, width)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1, width)


def _q4_k(blocks: Bytes) -> Float32:
    """144 bytes: scale of the scales, scale of the minima, 12 bytes of them, 128 bytes of codes."""
    return _with_minima(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Bytes) -> Float32:
    """176 bytes: as Q4_K, with 32 bytes of fifth bits before the codes."""
    fifth: Bytes = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _with_minima(blocks, _nibbles(blocks[:, 48:], 32) | fifth << np.uint8(4))


def _with_minima(blocks: Bytes, codes: Bytes) -> Float32:
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    values = codes.astype(np.float32) * (scales * _half(blocks, 0)[..., None])
    shifted: Float32 = values - minima * _half(blocks, 2)[..., None]
    return shifted


def _q6_k(blocks: Bytes) -> Float32:
    """210 bytes: 128 of low bits, 64 of high ones, 16 scales of 8 bits, and their scale."""
    low = _nibbles(blocks[:, :128], 64).reshape(len(blocks), 8, 32)
    pairs = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32)
    high = (pairs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(blocks), 8, 32)
    codes = (low | high << 4).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _half(blocks, 208)
    return codes.reshape(len(blocks), 16, 16) * scales[..., None]


DECODERS: Mapping[str, Callable[[Bytes], Float32]] = {"Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
