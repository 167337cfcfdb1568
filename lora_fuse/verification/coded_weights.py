"""Weights of a base that are stored as codes, decoded a second time: by torch's float8 and by gguf's own code.

Found by other lines than the engine's, too: from the codes' dtype and what lies beside them. What is not understood is
a problem, and fails the verification.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint.stored import open_gguf
from lora_fuse.errors import BadCheckpoint, naming_extras
from lora_fuse.machine import files
from lora_fuse.verification.nearest import Wide, widen
from lora_fuse.verification.weights import NUMBERS, Array, Rows, StoredTensor, WeightFile, Weights

MAGIC = b"GGUF"
TORCH = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
PLAIN = {"F64", "F32", "F16", "BF16"}
WRITTEN = "BF16"
OF_SINGLE = 4e-6  # what float32 may be off by on the way to a code, of the largest number there
OF_HALF = 1.2e-3  # a block is rounded at a scale that is rounded to float16 later
SMALLEST = 1e-29  # scales of what is all zero
LAYERS = "_quantization_metadata"  # ComfyUI's entry of a header
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}


@dataclass(frozen=True, slots=True)
class CodedTensor(StoredTensor):
    """A weight by the bytes of its codes: `kind` is their dtype in a header or their type in GGUF.

    `dtype` is the one that a merge has in its place. `scales` are float64, one or (rows, 1); `group` is ConvRot's.
    """

    kind: str
    scales: Wide | None = None
    group: int = 0
    scale_name: str = ""

    @classmethod
    def of(cls, stored: StoredTensor, scales: Wide | None = None, group: int = 0, scale_name: str = "") -> CodedTensor:
        """Give the codes of a tensor their meaning."""
        place = (stored.file, WRITTEN, stored.shape, stored.start, stored.nbytes, stored.refuse)
        return cls(*place, stored.dtype, scales, group, scale_name)

    def is_like(self, other: StoredTensor) -> bool:
        """True where another tensor is codes of the same kind and shape, with as many scales."""
        if not isinstance(other, CodedTensor):
            return StoredTensor.is_like(self, other)
        shapes = [None if one.scales is None else one.scales.shape for one in (self, other)]
        return (self.kind, self.shape, self.group) == (other.kind, other.shape, other.group) and shapes[0] == shapes[1]

    def off(self, exact: Wide, rows: Rows) -> npt.NDArray[np.bool_]:
        """True for each value of some rows whose code is not the one that is nearest to `exact` at its scale."""
        codes, scales = self._codes_and_scales(rows)
        wanted = exact
        if self.group:
            groups = exact.reshape(len(rows), -1, self.group)
            wanted = np.asarray(groups @ _hadamard(self.group), np.float64).reshape(exact.shape)
        wanted = np.divide(wanted, scales, out=np.zeros(wanted.shape), where=scales > 0)
        grid = self._grid()
        above = np.clip(np.searchsorted(grid, wanted), 1, len(grid) - 1)
        best = np.minimum(np.abs(wanted - grid[above - 1]), np.abs(wanted - grid[above]))
        slack = np.abs(wanted) * (OF_HALF if self.kind == "Q8_0" else OF_SINGLE)
        slack += OF_SINGLE * np.abs(wanted).max(axis=1, keepdims=True) if self.group else 0
        return np.asarray(np.abs(codes - wanted) > best + slack)

    def unused(self, rows: Rows) -> bool:
        """True where a scale is so large that the codes of its weight, row or block reach less than half of theirs."""
        by_row = self.kind == "Q8_0" or (self.scales is not None and self.scales.size > 1)
        codes, scales = self._codes_and_scales(rows if by_row else np.arange(len(self)))
        if self.kind != "Q8_0" and self.scales is None:
            return False
        tops = np.abs(codes.reshape(-1, 32) if self.kind == "Q8_0" else codes if by_row else codes.reshape(1, -1))
        used = tops.max(axis=1) >= self._grid()[-1] / 2
        empty = scales.reshape(len(used), -1)[:, 0] < SMALLEST if by_row else scales.reshape(-1)[:1] < SMALLEST
        return not bool((used | empty).all())

    def _codes_and_scales(self, rows: Rows) -> tuple[Wide, Wide]:
        """The numbers that codes are, (n, columns), and the scale of each of them."""
        stored = self.codes(rows)
        if self.kind == "Q8_0":
            blocks = stored.reshape(-1, 34)
            halves = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64)
            numbers = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float64)
            return numbers.reshape(len(rows), -1), np.repeat(halves, 32, axis=1).reshape(len(rows), -1)
        numbers = self._unscaled(stored).reshape(len(rows), -1)
        scales: Wide = (
            np.ones(()) if self.scales is None else self.scales if self.scales.size == 1 else self.scales[rows]
        )
        return numbers, np.broadcast_to(scales, numbers.shape)

    def _grid(self) -> Wide:
        """All numbers that a code can be, in order."""
        if self.kind in TORCH:
            numbers = self._unscaled(np.arange(256, dtype=np.uint8))
            return np.unique(numbers[np.isfinite(numbers)])
        return np.arange(-127.0, 128.0)

    @property
    def nbytes_merged(self) -> int:
        """See `StoredTensor`."""
        return math.prod(self.shape) * NUMBERS[self.dtype].itemsize

    def codes(self, rows: Rows | None = None) -> npt.NDArray[np.uint8]:
        """The bytes of the codes of all rows or some, uint8 (rows, bytes)."""
        shape = (len(self), self.nbytes // max(1, len(self)))
        stored = StoredTensor(self.file, "U8", shape, self.start, self.nbytes, self.refuse)
        return stored.read(np.arange(len(self)) if rows is None else rows)

    def read(self, rows: Rows | None = None) -> Array:
        """Values of all rows or some, float32 (rows, ...): the exact product of code and scale, rounded once."""
        codes = self.codes(rows)
        values = self._unscaled(codes).reshape(len(codes), -1)
        if self.group:
            groups = values.reshape(len(codes), -1, self.group)
            values = np.asarray(groups @ _hadamard(self.group), np.float64).reshape(values.shape)
        if self.scales is not None:
            scales = self.scales if rows is None or self.scales.size == 1 else self.scales[rows]
            values *= scales
        with np.errstate(over="ignore"):
            return values.astype(np.float32).reshape(len(codes), *self.shape[1:])

    def _unscaled(self, codes: npt.NDArray[np.uint8]) -> Wide:
        if self.kind in TORCH:
            import torch

            return torch.from_numpy(codes).view(getattr(torch, TORCH[self.kind])).to(torch.float64).numpy()
        if self.kind == "I8":
            return codes.view(np.int8).astype(np.float64)
        with naming_extras("a GGUF base"):
            import gguf

        return widen(gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[self.kind]))


@dataclass(frozen=True, slots=True)
class ConvertedTensor(StoredTensor):
    """A tensor that a merge has in another dtype, which is `dtype`; its values are read as they are, in `kind`."""

    kind: str

    @classmethod
    def of(cls, stored: StoredTensor, dtype: str) -> ConvertedTensor:
        """Give a tensor another dtype."""
        return cls(stored.file, dtype, stored.shape, stored.start, stored.nbytes, stored.refuse, stored.dtype)

    @property
    def nbytes_merged(self) -> int:
        """See `StoredTensor`."""
        return math.prod(self.shape) * NUMBERS[self.dtype].itemsize

    def read(self, rows: Rows | None = None) -> Array:
        """Values in the base's dtype, see `StoredTensor`."""
        return StoredTensor(self.file, self.kind, self.shape, self.start, self.nbytes, self.refuse).read(rows)


def _hadamard(size: int) -> Wide:
    """Build the orthogonal matrix of ConvRot, (size, size); of whole numbers the products are exact in float64."""
    smallest = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64) / 2
    matrix: Wide = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.asarray(np.kron(smallest, matrix), np.float64)
    return matrix


@dataclass(slots=True)
class CodedWeights:
    """The weights that are codes, by name, the names of what goes with them, and what was not understood, by weight."""

    tensors: dict[str, CodedTensor] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)


def open_weights(paths: Sequence[Path | WeightFile]) -> Weights:
    """Open the tensors of safetensors files, or of one GGUF file.

    Raises:
        BadCheckpoint: a file cannot be opened.
    """
    first = paths[0].path if isinstance(paths[0], WeightFile) else paths[0]
    try:
        with files.open_regular(first) as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise BadCheckpoint(f"{first} cannot be read ({error.strerror}); fetch or make it again") from error
    return _gguf_weights(first) if is_gguf else Weights(paths)


def _gguf_weights(path: Path) -> Weights:
    """The tensors of a GGUF file as gguf's reader finds them; dtypes are ggml's types."""
    reader = open_gguf(path)
    found = Weights([])
    found.is_gguf = True
    entries = {
        name: str(entry.contents()) for name, entry in reader.fields.items() if not name.startswith(MAGIC.decode())
    }
    found.metadata[path.name] = entries
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        place = (int(tensor.data_offset), int(tensor.n_bytes))
        found.add(tensor.name, StoredTensor(WeightFile(path), tensor.tensor_type.name, shape, *place, BadCheckpoint))
    return found


def read_codes(base: Weights) -> CodedWeights:
    """Find the weights that are codes; scales and descriptions are read.

    Raises:
        BadCheckpoint: a file cannot be read.
    """
    found = CodedWeights()
    listed = _listed(base)
    markers = {name for name in base.names() if name.split(".")[-1] == "scaled_fp8"}
    for name in sorted(base.names() - markers):
        stored = base[name]
        module = name.removesuffix(".weight")
        try:
            said = _said(base, f"{module}.comfy_quant", listed, module) if module != name else None
            if stored.dtype not in {*TORCH, "I8"} and said is None and _is_plain(stored.dtype):
                continue
            tensor = _coded(base, name, stored, said)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            found.problems[name] = f"{name} is stored as {stored.dtype}, and what that means is not known: {error}"
            continue
        found.tensors[name] = tensor
        goes_with = ("comfy_quant", "weight_scale", "scale_weight", "input_scale", "scale_input")
        found.beside |= {f"{module}.{one}" for one in goes_with} & base.names() if module != name else set()
    found.beside |= markers if found.tensors else set()
    return found


def _is_plain(dtype: str) -> bool:
    return dtype in PLAIN or dtype in {"BOOL", "C64"} or dtype[1:].isdigit()


def _coded(base: Weights, name: str, stored: StoredTensor, said: Mapping[str, Any] | None) -> CodedTensor:
    if stored.dtype not in {*TORCH, "I8"} and said is None:
        return CodedTensor.of(stored)
    module = name.removesuffix(".weight")
    beside = [f"{module}.{one}" for one in ("weight_scale", "scale_weight")]
    scale = next((base[one] for one in beside if one in base.names()), None)
    if said is None and stored.dtype == "I8":
        raise ValueError("nothing describes its codes")
    if said is not None and (FORMATS[said["format"]] != stored.dtype or scale is None):
        raise ValueError(f"it is said to be {said}")
    group = 0
    if said is not None:
        settings = {**said.get("params", {}), **said}
        group = int(settings.get("convrot_groupsize", 256)) if settings.get("convrot") else 0
    if scale is None:
        return CodedTensor.of(stored)
    scales = widen(scale.read())
    if scales.size not in (1, len(stored)) or not np.isfinite(scales).all() or scale.dtype != "F32":
        raise ValueError(f"its scales are {scale.dtype} {scale.shape}, or no numbers")
    name = next(one for one in beside if one in base.names())
    return CodedTensor.of(stored, scales.reshape(-1, 1) if scales.size > 1 else scales.reshape(()), group, name)


def _said(base: Weights, name: str, listed: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The description of a module's codes: a tensor of text, or an entry of the header, which may lack a prefix."""
    if name in base.names():
        said: Any = files.parse_json(base[name].read().tobytes())
        return said if isinstance(said, dict) else {"format": None}
    return next((said for key, said in listed.items() if f".{module}".endswith(f".{key}")), None)


def _listed(base: Weights) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, metadata in base.metadata.items():
        try:
            layers = files.parse_json(metadata[LAYERS])["layers"] if LAYERS in metadata else {}
            found |= {str(layer): said for layer, said in layers.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{path}: {LAYERS} in its header lists no layers ({error}); fetch it again") from error
    return found


def decoded(base: Weights, codes: CodedWeights, dtype: str | None = None) -> Weights:
    """The tensors of a base as a merge has them whose codes are all decoded, and whose floats all have a dtype."""
    found = Weights([])
    found.metadata = {name: _without_layers(metadata) for name, metadata in base.metadata.items()}
    for name in base.names() - codes.beside:
        tensor = codes.tensors.get(name, base[name])
        if dtype is not None and tensor.dtype in PLAIN and tensor.dtype != dtype:
            tensor = (
                replace(tensor, dtype=dtype) if isinstance(tensor, CodedTensor) else ConvertedTensor.of(tensor, dtype)
            )
        found.add(name, tensor)
    return found


def requantised(weights: Weights, codes: CodedWeights, targets: Set[str]) -> Weights:
    """The tensors of a base, or of a merge whose targets are quantised as they were; their scales are theirs."""
    found = Weights([])
    found.metadata = weights.metadata
    coded = {name: codes.tensors[name] for name in targets if name in codes.tensors}
    for name in weights.names() - {tensor.scale_name for tensor in coded.values()}:
        found.add(name, replace(coded[name], dtype=coded[name].kind) if name in coded else weights[name])
    return found


def _without_layers(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != LAYERS}
