"""A LoRA on disk: a safetensors file, or a PEFT folder. Opening reads the header and the alphas, not the factors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import read_header
from lora_fuse.errors import BadCheckpoint, BadLora
from lora_fuse.files import hash_file
from lora_fuse.header import Header, TensorInfo
from lora_fuse.lora import ALPHA, AdapterConfig, Update, parse_adapter_config, parse_lora

NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An opened LoRA: its header, the updates that it holds, and the sha256 of the whole file."""

    path: Path
    header: Header
    updates: tuple[Update, ...]
    sha256: str

    def read(self, key: str) -> npt.NDArray[np.float64]:
        """One tensor of the file, widened to float64 (exact for every dtype that a LoRA may have)."""
        return read_array(self.path, self.header.tensors[key])


def read_array(path: Path, tensor: TensorInfo) -> npt.NDArray[np.float64]:
    """Read one floating-point tensor as float64, in its own shape.

    Raises:
        BadLora: the tensor holds no floating-point numbers.
    """
    if tensor.dtype not in NUMPY_DTYPES:
        raise BadLora(f"{path}: {tensor.name!r} is {tensor.dtype}; a LoRA holds {', '.join(NUMPY_DTYPES)}")
    with path.open("rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.nbytes)
    values: npt.NDArray[Any] = np.frombuffer(data, dtype=NUMPY_DTYPES[tensor.dtype])
    return values.astype(np.float64).reshape(tensor.shape)


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA file, or a PEFT folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        BadLora: it is missing, is not safetensors, is truncated, or its keys do not add up.
    """
    config, file = AdapterConfig(), path
    if path.is_dir():
        config, file = _open_peft_folder(path)
    if file.suffix != ".safetensors":
        raise BadLora(f"{file} is not a .safetensors file; a pickle can run code when it is opened, convert it first")
    try:
        header = read_header(file)
    except BadCheckpoint as error:
        raise BadLora(f"LoRA: {error}") from error
    if "lora_adapter_metadata" in header.metadata:
        config = parse_adapter_config(header.metadata["lora_adapter_metadata"], f"{file} (lora_adapter_metadata)")
    alphas = {name: _scalar(file, tensor) for name, tensor in header.tensors.items() if name.endswith(ALPHA)}
    updates = parse_lora(header.tensors, alphas, config, str(file))
    return LoraFile(file, header, updates, hash_file(file).sha256)


def _open_peft_folder(folder: Path) -> tuple[AdapterConfig, Path]:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (config, weights):
        if not needed.is_file():
            raise BadLora(f"{folder} is no PEFT folder: it has no {needed.name}; give the .safetensors file itself")
    return parse_adapter_config(config.read_text(encoding="utf-8"), str(config)), weights


def _scalar(path: Path, tensor: TensorInfo) -> float:
    values = read_array(path, tensor)
    if values.size != 1:
        raise BadLora(f"{path}: {tensor.name!r} has the shape {list(tensor.shape)}; an alpha is one number")
    return float(values.reshape(-1)[0])
