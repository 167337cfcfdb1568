"""The safetensors header, parsed from bytes.

Layout (github.com/huggingface/safetensors, "Format"): an unsigned little-endian 64-bit length N, N bytes of JSON
that map a tensor's name to its dtype, shape and data offsets, then the data; offsets count from the end of the JSON.

Invariant of a `Header`: tensors are in file order, do not overlap, leave no hole and end where the file ends. What is
accepted here the reference implementation reads, and as the same tensors. It refuses less: a key that stands in a
header twice, a field that the format does not have (its meaning would be lost in a merge), an entry that is a list, a
shape that no array can have, more entries and longer names than a model has.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_fuse.checkpoint.dtypes import DTYPES
from lora_fuse.errors import BadCheckpoint

PREFIX = 8  # bytes of the length before the JSON
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMENSIONS = 64  # numpy's limit
MAX_NUMBER = 2**64 - 1  # as the reference reads a shape or an offset
MAX_SIZE = 2**63 - 1  # bytes of a tensor, as numpy and torch count them
MAX_NAME = 1000  # characters of a tensor's
# The most of each sign that a header has: entries (a mixture of experts has some ten thousand), lists, items of them.
MAX_SIGNS = {b"{": 500_000, b"[": 1_000_000, b",": 10_000_000}
FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor in its file: from byte `start` (included) to byte `end` (not included)."""

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
        """Length and JSON of the same tensors with one more metadata entry, padded to 8 bytes as the format's own.

        Raises:
            BadCheckpoint: there is no room for the entry below the limit of the reference implementation.
        """
        entries = json.loads(self.raw[PREFIX:].decode())
        entries.pop("__metadata__", None)
        return self.pack(entries, {**self.metadata, name: value})

    @staticmethod
    def pack(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
        """Length prefix and JSON of tensors in the order given, padded to 8 bytes as the format's own.

        Raises:
            BadCheckpoint: it would be larger than the reference implementation reads.
        """
        text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % PREFIX)
        if len(text) > MAX_HEADER:
            raise BadCheckpoint(
                f"with the metadata {', '.join(map(repr, metadata))} the header of {len(entries)} tensors would be "
                f"{len(text)} bytes, and safetensors reads {MAX_HEADER}; split the file into shards"
            )
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
    """Parse the length prefix and JSON, the first ``8 + N`` bytes of a file of `file_size` bytes.

    Raises:
        BadCheckpoint: the JSON is not a safetensors header, or its offsets do not tile the file exactly.
    """
    for sign, most in MAX_SIGNS.items():
        if (count := raw.count(sign)) > most:
            raise BadCheckpoint(f"{where}: its header has {count} times {sign.decode()!r}, and at most {most} are read")
    try:
        entries = json.loads(raw[PREFIX:].decode(), object_pairs_hook=_mapping, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(
            f"{where} is not a safetensors file: its header does not parse ({error}); fetch it again"
        ) from error
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise BadCheckpoint(f"{where} is not a safetensors file: its header is a {kind}, not a mapping; fetch it again")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadCheckpoint(f"{where}: __metadata__ in the header is not a mapping of strings; fetch it again")
    tensors = [_tensor(name, entry, len(raw), where) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_tiling(tensors, len(raw), file_size, where)
    return Header(raw, {tensor.name: tensor for tensor in tensors}, metadata)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice and no escape is half of a character."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands in it twice")
    for text in (*entries, *(value for value in entries.values() if isinstance(value, str))):
        text.encode()  # of a lone surrogate a ValueError
    return entries


def _integer(digits: str) -> float:
    """A JSON number without a fraction; as for the reference, -0 and what is far beyond 64 bits is a float."""
    return float(digits) if digits == "-0" or len(digits) > len(str(MAX_NUMBER)) else int(digits)


def _tensor(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or not entry.keys() >= set(FIELDS):
        raise BadCheckpoint(f"{where}: the header entry of {name!r} lacks {' or '.join(FIELDS)}; fetch it again")
    if len(name) > MAX_NAME:
        raise BadCheckpoint(f"{where}: the name {name[:60]!r}… has {len(name)} characters, at most {MAX_NAME} are read")
    if unknown := sorted(entry.keys() - set(FIELDS)):
        raise BadCheckpoint(
            f"{where}: the header entry of {name!r} has {unknown[0]!r}, and the format knows {', '.join(FIELDS)}; "
            "load the file with safetensors and save it again"
        )
    dtype, shape, offsets = (entry[field] for field in FIELDS)
    if not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        raise BadCheckpoint(
            f"{where}: the header entry of {name!r} has a shape or offset that is no natural number of 64 bits, or "
            "not two offsets; fetch it again"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadCheckpoint(f"{where}: {name!r} has the dtype {dtype!r}; known are {', '.join(DTYPES)}")
    bits = DTYPES[dtype].bits
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) * bits > 8 * MAX_SIZE:
        raise BadCheckpoint(
            f"{where}: {name!r} has a shape of {len(shape)} dimensions that no array can have; fetch it again"
        )
    start, end = offsets
    if 8 * (end - start) != math.prod(shape) * bits:
        raise BadCheckpoint(
            f"{where}: {name!r} is {dtype} {shape}, {math.prod(shape) * bits / 8:.16g} bytes, "
            f"but its data_offsets span {end - start}; fetch it again"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)


def _are_naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number <= MAX_NUMBER for number in numbers)


def _check_tiling(tensors: list[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            raise BadCheckpoint(
                f"{where}: {tensor.name!r} begins at byte {tensor.start} where {at} is expected; "
                "the header's offsets overlap or leave a hole; fetch it again"
            )
        at = tensor.end
    if at != file_size:
        raise BadCheckpoint(
            f"{where} is {'truncated' if file_size < at else 'too long'}: the header describes {at} bytes, "
            f"the file has {file_size}; fetch it again"
        )
