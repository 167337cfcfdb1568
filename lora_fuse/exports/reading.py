"""Every weight of an export, decoded: what an engine computes with, in float32 and under diffusers' names.

Written from the containers' descriptions and not from the writers: safetensors with ComfyUI's `comfy_quant` or a scale
beside an 8-bit weight, plain safetensors, and GGUF by gguf-py's own reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Header, TensorInfo, dtypes, read_header
from lora_fuse.checkpoint.stored import is_gguf, open_gguf
from lora_fuse.errors import BadCheckpoint, Unquantisable
from lora_fuse.machine import files
from lora_fuse.quantisation import decode, decode_ggml

Float32s = npt.NDArray[np.float32]
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of older exports, and of other tools'
# What lies beside a weight, after its module's name.
BESIDE = ("comfy_quant", "weight_scale", "weight_scale_2", "scale_weight", "input_scale", "scale_input")
MARKER = "scaled_fp8"  # a tensor of the whole file: all codes are fp8 (ComfyUI before 0.8)


def read_export(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[tuple[str, Float32s]]:
    """Read an export, one tensor at a time; empty ones, which are flags, are left out.

    `shapes` are the model's own by name, for formats that pad a matrix.

    Raises:
        BadCheckpoint: the file is no export, or what is stored of a weight does not add up.
    """
    with files.open_regular(path) as file:
        gguf = is_gguf(file.read(4))
    found = _read_gguf(path) if gguf else _read_safetensors(path, shapes or {})
    for name, values in found:
        shape = (shapes or {}).get(name, values.shape)
        if values.shape != tuple(shape):
            raise BadCheckpoint(f"{path}: {name!r} is {list(values.shape)}, and the model's is {list(shape)}")
        if values.size:
            yield name, values


def _read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Float32s]]:
    header = read_header(path)
    prefix = next((one for one in PREFIXES if any(name.startswith(one) for name in header.tensors)), "")
    beside = {name for name in header.tensors if name.rpartition(".")[2] in BESIDE or name == prefix + MARKER}
    for name, tensor in header.tensors.items():
        if name in beside:
            continue
        module, _, last = name.rpartition(".")
        parts = [part for part in BESIDE if f"{module}.{part}" in beside] if last == "weight" else []
        bare = name.removeprefix(prefix)
        values = _array(path, tensor)
        if prefix + MARKER in beside and parts:
            values = values.astype(dtypes.DTYPES["F8_E4M3"].numpy)  # codes of any other kind become numbers of fp8
        if parts or tensor.dtype.startswith("F8"):
            yield bare, _decoded(path, name, header, {"weight": values}, parts, shapes.get(bare))
        else:
            yield bare, values.astype(np.float32)


def _decoded(
    path: Path,
    name: str,
    header: Header,
    stored: dict[str, npt.NDArray[Any]],
    parts: list[str],
    shape: tuple[int, ...] | None,
) -> Float32s:
    module = name.rpartition(".")[0]
    stored |= {part: _array(path, header.tensors[f"{module}.{part}"]) for part in parts}
    try:
        return decode(stored, None if shape is None or len(shape) != 2 else (shape[0], shape[1]))
    except Unquantisable as error:
        raise BadCheckpoint(f"{path}: {name!r}: {error}") from error


def _array(path: Path, tensor: TensorInfo) -> npt.NDArray[Any]:
    kind = dtypes.DTYPES[tensor.dtype].numpy
    with files.open_regular(path) as file:
        file.seek(tensor.start)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise BadCheckpoint(f"{path} ends within {tensor.name!r}")
    return np.frombuffer(data, kind).reshape(tensor.shape)


def _read_gguf(path: Path) -> Iterator[tuple[str, Float32s]]:
    reader = open_gguf(path)
    prefix = next((one for one in PREFIXES if any(tensor.name.startswith(one) for tensor in reader.tensors)), "")
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if tensor.n_elements:
            try:
                values = decode_ggml(np.asarray(tensor.data), tensor.tensor_type.name)
            except Unquantisable as error:
                raise BadCheckpoint(f"{path}: {tensor.name!r}: {error}") from error
            yield tensor.name.removeprefix(prefix), values.reshape(shape)
