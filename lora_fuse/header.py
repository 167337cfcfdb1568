"""The safetensors header, parsed from bytes.

Layout (github.com/huggingface/safetensors, "Format"): an unsigned little-endian 64-bit length N, N bytes of JSON
that map a tensor's name to its dtype, shape and data offsets, then the data; offsets count from the end of the JSON.
A shard that we merge has the base shard's entries in its order, and one more entry in the metadata.

Invariant of a `Header`: tensors are in file order, do not overlap, leave no hole and end where the file ends.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from lora_fuse.errors import BadCheckpoint

PREFIX = 8  # bytes of the length before the JSON
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file: `start` (included) to `end` (not included), in bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header; `tensors` is in file order, `raw` is the length prefix and the JSON, unchanged."""

    raw: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def with_metadata(self, name: str, value: str) -> bytes:
        """Length and JSON of the same tensors with one more metadata entry, padded to 8 bytes as the format's own."""
        entries = json.loads(self.raw[PREFIX:])
        metadata = {**self.metadata, name: value}
        entries = {"__metadata__": metadata} | {key: entry for key, entry in entries.items() if key != "__metadata__"}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % PREFIX)
        return struct.pack("<Q", len(text)) + text


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Length in bytes of the JSON, from the first 8 bytes of a file.

    Raises:
        BadCheckpoint: the file is too short or the length is not possible.
    """
    if len(prefix) < PREFIX:
        raise BadCheckpoint(
            f"{where} is not a safetensors file: {file_size} bytes, shorter than a header; fetch it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER, file_size - PREFIX):
        raise BadCheckpoint(
            f"{where} is not a safetensors file, or it is truncated: its header would be {length} bytes and the file "
            f"has {file_size}; fetch it again"
        )
    return int(length)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Parse the length prefix and JSON of a file of `file_size` bytes.

    Args:
        raw: the first ``8 + N`` bytes of the file.
        file_size: size of the whole file in bytes.
        where: what to call the file in an error.

    Raises:
        BadCheckpoint: the JSON is not a safetensors header, or its offsets do not tile the file exactly.
    """
    try:
        entries = json.loads(raw[PREFIX:], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{where} is not a safetensors file: its header does not parse ({error})") from error
    if not isinstance(entries, dict):
        raise BadCheckpoint(
            f"{where} is not a safetensors file: its header is a {type(entries).__name__}, not a mapping"
        )
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadCheckpoint(f"{where}: __metadata__ in the header is not a mapping of strings")
    tensors = [_tensor(name, entry, len(raw), where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_tiling(tensors, len(raw), file_size, where)
    return Header(raw, {tensor.name: tensor for tensor in tensors}, metadata)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in it twice")
    return entries


def _tensor(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError) as error:
        raise BadCheckpoint(f"{where}: the header entry of {name!r} lacks dtype, shape or data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise BadCheckpoint(f"{where}: the header entry of {name!r} has a shape or offset that is no natural number")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadCheckpoint(f"{where}: {name!r} has the dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise BadCheckpoint(
            f"{where}: {name!r} is {dtype} {list(shape)}, {math.prod(shape) * DTYPE_BYTES[dtype]} bytes, "
            f"but its data_offsets span {end - start}"
        )
    return TensorInfo(name, dtype, shape, data_start + start, data_start + end)


def _check_tiling(tensors: list[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            raise BadCheckpoint(
                f"{where}: {tensor.name!r} begins at byte {tensor.start} where {at} is expected; "
                "the header's offsets overlap or leave a hole"
            )
        at = tensor.end
    if at != file_size:
        raise BadCheckpoint(
            f"{where} is {'truncated' if file_size < at else 'too long'}: the header describes {at} bytes, "
            f"the file has {file_size}; fetch it again"
        )
