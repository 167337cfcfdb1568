"""A LoRA on disk: a safetensors file, or a PEFT folder. Opening reads the header and the alphas, not the factors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Header, TensorInfo, dtypes, read_header
from lora_fuse.errors import BadCheckpoint, BadLora
from lora_fuse.lora.adapter_config import AdapterConfig, parse_adapter_config
from lora_fuse.lora.key_parser import LoraDelta, parse_lora
from lora_fuse.machine import files

INTEGERS = {name for name, dtype in dtypes.DTYPES.items() if not dtype.is_float and name != "BOOL"}


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An opened LoRA: its header, the deltas that it holds, and the sha256 of the whole file.

    Of a PEFT folder that is its weights' file, and `config_sha256` is of its `adapter_config.json`.
    """

    path: Path
    header: Header
    deltas: tuple[LoraDelta, ...]
    sha256: str
    config_sha256: str | None = None

    def read(self, delta: LoraDelta) -> dict[str, npt.NDArray[np.float64]]:
        """The tensors of a delta by role, widened to float64 (exact for every dtype that a LoRA may have)."""
        tensors = {role: self.header.tensors[key] for role, key in delta.keys.items()}
        return {role: _read(self.path, tensor).astype(np.float64) for role, tensor in tensors.items()}


def _read(path: Path, tensor: TensorInfo, allowed: Collection[str] = dtypes.ROUNDABLE) -> npt.NDArray[Any]:
    if tensor.dtype not in allowed:
        raise BadLora(f"{path}: {tensor.name!r} is {tensor.dtype}; a LoRA holds {', '.join(dtypes.ROUNDABLE)}")
    try:
        with path.open("rb") as file:
            file.seek(tensor.start)
            data = file.read(tensor.nbytes)
    except OSError as error:
        raise BadLora(f"{path} cannot be read ({error.strerror}); check the disk or fetch it again") from error
    if len(data) < tensor.nbytes:
        raise BadLora(f"{path} ended {tensor.nbytes - len(data)} bytes early: it changed while it was read")
    return np.frombuffer(data, dtype=dtypes.DTYPES[tensor.dtype].numpy).reshape(tensor.shape)


def open_lora(path: Path) -> LoraFile:
    """Open a LoRA file, or a PEFT folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        BadLora: it is missing, is not safetensors, is truncated, holds NaN, or its keys do not add up.
    """
    config = AdapterConfig()
    file = path
    config_sha256 = None
    if path.is_dir():
        config, file, config_sha256 = _open_peft_folder(path)
    if file.suffix != ".safetensors":
        raise BadLora(f"{file} is not a .safetensors file; a pickle can run code when it is opened, convert it first")
    try:
        header = read_header(file)
    except BadCheckpoint as error:
        raise BadLora(f"LoRA: {error}") from error
    if "lora_adapter_metadata" in header.metadata:
        config = parse_adapter_config(header.metadata["lora_adapter_metadata"], f"{file} (lora_adapter_metadata)")
    alphas = {name: _scalar(file, tensor) for name, tensor in header.tensors.items() if name.endswith(".alpha")}
    deltas = parse_lora(header.tensors, alphas, config, str(file))
    for delta in deltas:
        for key in delta.keys.values():
            if not np.isfinite(_read(file, header.tensors[key])).all():
                raise BadLora(f"{file}: {key!r} holds NaN or infinity; the file is broken, fetch or train it again")
    return LoraFile(file, header, deltas, files.hash_file(file).sha256, config_sha256)


def _open_peft_folder(folder: Path) -> tuple[AdapterConfig, Path, str]:
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    for needed in (config, weights):
        if not needed.is_file():
            raise BadLora(f"{folder} is no PEFT folder: it has no {needed.name}; give the .safetensors file itself")
    try:
        content = config.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadLora(f"{config} cannot be read: {error}; fetch the folder again") from error
    return parse_adapter_config(text, str(config)), weights, hashlib.sha256(content).hexdigest()


def _scalar(path: Path, tensor: TensorInfo) -> float:
    values = _read(path, tensor, INTEGERS | set(dtypes.ROUNDABLE))
    if values.size != 1:
        raise BadLora(f"{path}: {tensor.name!r} has the shape {list(tensor.shape)}; an alpha is one number")
    return float(values.reshape(-1)[0])
