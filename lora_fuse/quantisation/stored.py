"""Quantised weights as containers hold them: what is stored beside a weight says how to read it.

ComfyUI puts a JSON text beside each weight, `M.comfy_quant`, bytes of UTF-8 (comfy/ops.py and comfy/quant_ops.py,
0.33.0). Other containers have a scale beside an 8-bit weight and no text. GGUF says the type of a tensor itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable, naming_extras
from lora_fuse.quantisation import blocks_of_floats, fp8, int8, q8_0
from lora_fuse.quantisation.values import Float32s

COMFY = "comfy_quant"
SCALES = ("weight_scale", "scale_weight")  # and the older name, beside ComfyUI's marker `scaled_fp8`
Stored = Mapping[str, npt.NDArray[np.generic]]


def comfy_mark(settings: Mapping[str, object]) -> npt.NDArray[np.uint8]:
    """The bytes of `M.comfy_quant`, uint8; spaces make them a multiple of 8, so that what lies behind is aligned."""
    text = json.dumps(settings, separators=(",", ":")).encode()
    return np.frombuffer(text + b" " * (-len(text) % 8), np.uint8)


def settings_of(stored: Stored) -> dict[str, Any]:
    """The settings of `M.comfy_quant`, those under `params` among them; empty without.

    Raises:
        Unquantisable: it is no JSON object.
    """
    if COMFY not in stored:
        return {}
    try:
        settings = json.loads(stored[COMFY].tobytes())
    except ValueError as error:
        raise Unquantisable(f"its {COMFY} is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise Unquantisable(f"its {COMFY} is a {type(settings).__name__}, and an object is read")
    return {**settings, **(settings["params"] if isinstance(settings.get("params"), dict) else {})}


def decode(stored: Stored, shape: tuple[int, int] | None = None) -> Float32s:
    """Values, float32, of what is stored of a weight: ``{"weight": …, "weight_scale": …, "comfy_quant": …}``.

    The shape is that of the weight, for formats that pad it; None leaves the padding.

    Raises:
        Unquantisable: the format is not known, or its arrays do not belong together.
    """
    weight = stored["weight"]
    scale = next((stored[name] for name in SCALES if name in stored), None)
    settings = settings_of(stored)
    name = str(settings.get("format", "weight_scale_2" if "weight_scale_2" in stored else weight.dtype.name))
    if weight.dtype.name.startswith("float8") and name in (weight.dtype.name, "float8_e4m3fn", "float8_e5m2"):
        return fp8.decode(weight, scale)
    if scale is not None and weight.dtype == np.int8 and name in ("int8_tensorwise", "int8"):
        group = int(settings.get("convrot_groupsize", int8.GROUPS[0])) if settings.get("convrot") else None
        return int8.decode(weight.view(np.int8), scale.astype(np.float32), group)
    if scale is not None and name == "mxfp8" and weight.dtype.itemsize == 1:
        return blocks_of_floats.decode_mxfp8(weight, scale, shape)
    if scale is not None and name in ("nvfp4", "weight_scale_2") and weight.dtype == np.uint8:
        return blocks_of_floats.decode_nvfp4(weight.view(np.uint8), scale, stored["weight_scale_2"], shape)
    raise Unquantisable(
        f"it is {weight.dtype} with {', '.join(sorted(stored.keys() - {'weight'})) or 'no scale'}, format {name!r}; "
        "read are float8, int8_tensorwise, mxfp8 and nvfp4"
    )


def decode_ggml(blocks: npt.NDArray[np.uint8], kind: str) -> Float32s:
    """Values, float32, of the bytes of a GGUF tensor ``(…, bytes of a row)``; `kind` is a type's name, ``Q4_K``.

    Raises:
        Unquantisable: the type is not known, or these are no whole blocks.
    """
    if kind == "Q8_0" and blocks.ndim == 2:
        return q8_0.decode(blocks)
    with naming_extras(f"a GGUF tensor of type {kind}"):
        import gguf
    try:
        values: Float32s = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError, ValueError) as error:
        raise Unquantisable(f"it is of ggml's type {kind}, which cannot be read here ({error})") from error
    return values
