"""The formats, a row each: what is stored of a weight, how it is made and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_fuse.quantisation import blocks_of_floats, fp8, int8, q8_0
from lora_fuse.quantisation.stored import COMFY, comfy_mark, decode
from lora_fuse.quantisation.swizzle import tiled_shape
from lora_fuse.quantisation.values import Float32s

Shape = tuple[int, int]
Layout = dict[str, tuple[str, tuple[int, ...]]]
Encoded = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class QuantisedFormat:
    """One format of weights.

    `layout` says what is stored of a matrix ``(N, K)``, before it is made: by suffix a dtype of safetensors and a
    shape. `encode` makes that of a float32 matrix, `decode` is told the matrix's shape and gives float32 back; both are
    the same to the bit on every machine. `encode` raises `Unquantisable` for what the format cannot hold, `layout` for
    a shape.
    """

    layout: Callable[[Shape], Layout]
    encode: Callable[[Float32s, fp8.Fp8Options], Encoded]
    decode: Callable[[Mapping[str, npt.NDArray[np.generic]], Shape], Float32s] = decode


_FP8 = {"format": "float8_e4m3fn"}
_MXFP8 = {"format": "mxfp8"}
_NVFP4 = {"format": "nvfp4"}


def _int8_mark(columns: int) -> npt.NDArray[np.uint8]:
    return comfy_mark({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": int8.group_of(columns)})


def _int8_layout(shape: Shape) -> Layout:
    return {"weight": ("I8", shape), "weight_scale": ("F32", (shape[0], 1)), COMFY: ("U8", _int8_mark(shape[1]).shape)}


def _int8_encode(matrix: Float32s, _options: fp8.Fp8Options) -> Encoded:
    return {**int8.encode(matrix), COMFY: _int8_mark(matrix.shape[1])}


def _q8_0_layout(shape: Shape) -> Layout:
    return {"weight": ("U8", (shape[0], q8_0.columns_in_bytes(shape[1])))}


def _q8_0_encode(matrix: Float32s, _options: fp8.Fp8Options) -> Encoded:
    return q8_0.encode(matrix)


def _q8_0_decode(stored: Mapping[str, npt.NDArray[np.generic]], _shape: Shape) -> Float32s:
    return q8_0.decode(stored["weight"].view(np.uint8))


def _fp8_layout(shape: Shape) -> Layout:
    return {"weight": ("F8_E4M3", shape), "weight_scale": ("F32", ()), COMFY: ("U8", comfy_mark(_FP8).shape)}


def _fp8_encode(matrix: Float32s, options: fp8.Fp8Options) -> Encoded:
    return {**fp8.encode(matrix, options), COMFY: comfy_mark(_FP8)}


def _fp8_rows_layout(shape: Shape) -> Layout:
    return {"weight": ("F8_E4M3", shape), "weight_scale": ("F32", (shape[0],))}


def _fp8_rows_encode(matrix: Float32s, _options: fp8.Fp8Options) -> Encoded:
    return fp8.encode_rows(matrix)


def _mxfp8_layout(shape: Shape) -> Layout:
    rows, columns = blocks_of_floats.padded_shape(shape, blocks_of_floats.MX_BLOCK)
    tiles = tiled_shape(rows, columns // blocks_of_floats.MX_BLOCK)
    mark = comfy_mark(_MXFP8).shape
    return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F8_E8M0", tiles), COMFY: ("U8", mark)}


def _mxfp8_encode(matrix: Float32s, _options: fp8.Fp8Options) -> Encoded:
    return {**blocks_of_floats.encode_mxfp8(matrix), COMFY: comfy_mark(_MXFP8)}


def _nvfp4_layout(shape: Shape) -> Layout:
    rows, columns = blocks_of_floats.padded_shape(shape, blocks_of_floats.NV_BLOCK)
    return {
        "weight": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", tiled_shape(rows, columns // blocks_of_floats.NV_BLOCK)),
        "weight_scale_2": ("F32", ()),
        COMFY: ("U8", comfy_mark(_NVFP4).shape),
    }


def _nvfp4_encode(matrix: Float32s, _options: fp8.Fp8Options) -> Encoded:
    return {**blocks_of_floats.encode_nvfp4(matrix), COMFY: comfy_mark(_NVFP4)}


FORMATS: Mapping[str, QuantisedFormat] = {
    "int8_convrot": QuantisedFormat(_int8_layout, _int8_encode),
    "q8_0": QuantisedFormat(_q8_0_layout, _q8_0_encode, _q8_0_decode),
    "fp8_scaled": QuantisedFormat(_fp8_layout, _fp8_encode),
    "fp8_rows": QuantisedFormat(_fp8_rows_layout, _fp8_rows_encode),
    "mxfp8": QuantisedFormat(_mxfp8_layout, _mxfp8_encode),
    "nvfp4": QuantisedFormat(_nvfp4_layout, _nvfp4_encode),
}
