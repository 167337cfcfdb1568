"""The header of a GGUF file, as a `Header` whose tensors have ggml's types for dtypes.

Layout (github.com/ggml-org/ggml, docs/gguf.md): the magic, a version, two counts, entries, descriptions of tensors, and
from the next multiple of the alignment on the data. Dimensions stand there in ggml's order, the fastest first, and are
turned here. Nothing of a length that the file only claims is read or allocated.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lora_fuse.checkpoint import Header, TensorInfo
from lora_fuse.errors import BadCheckpoint, naming_extras
from lora_fuse.machine import files

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where no entry says otherwise
MAX_HEADER = 100_000_000  # bytes
MAX_ENTRIES = 500_000
MAX_DIMENSIONS = 8
MAX_NAME = 1000  # characters of a tensor's
MAX_ALIGNMENT = 1 << 16
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF's entry of a tensor that is stored in another shape
# Codes of values in an entry: 0 to 7 and 10 to 12 numbers, 8 text, 9 a list.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT = 8
_LIST = 9


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of ggml: name, values of a block, and bytes of one (ggml/src/ggml.c, `type_traits`)."""

    name: str
    block: int
    nbytes: int


TYPES = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
}
BY_NAME = {one.name: one for one in TYPES.values()}


def is_gguf(start: bytes) -> bool:
    """True for the first bytes of a GGUF file."""
    return start.startswith(MAGIC)


def open_gguf(path: Path) -> GGUFReader:
    """Open a file with gguf's own reader, which believes every length in a header: it is read here before.

    Raises:
        BadCheckpoint: see `read_gguf_header`, or gguf's reader refuses it.
        MissingExtra: gguf is not installed.
    """
    try:
        with files.open_regular(path) as file:
            read_gguf_header(file, os.fstat(file.fileno()).st_size, str(path))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read ({error.strerror}); fetch or make it again") from error
    with naming_extras(f"reading {path}"):
        from gguf import GGUFReader
    try:
        return GGUFReader(path)
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise BadCheckpoint(f"{path} cannot be opened as GGUF ({error}); fetch or make it again") from error


class _Bytes:
    """Bytes of a header, read one after another; `fail` makes the error of one that does not add up."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file = file
        self._left = min(size, MAX_HEADER)
        self._where = where
        self.raw = bytearray()

    def fail(self, words: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._where} is no whole GGUF file: {words}; fetch it again")

    def take(self, count: int) -> bytes:
        self._left -= count
        data = self._file.read(count) if self._left >= 0 else b""
        if len(data) != count:
            raise self.fail(f"its header ends, or is larger than any, at byte {len(self.raw)}")
        self.raw += data
        return data

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return int(value)

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"a text before byte {len(self.raw)} is not UTF-8") from error


def read_gguf_header(file: BinaryIO, size: int, where: str) -> Header:
    """Read the header of a GGUF file of `size` bytes, from its start on.

    `metadata` of what is returned has the entries that are texts and numbers; `raw` is all before the first tensor.

    Raises:
        BadCheckpoint: it is of a version or has a type that is not known, is truncated, or its tensors overlap.
    """
    source = _Bytes(file, size, where)
    magic = source.take(4)
    version = source.number("I")
    if magic != MAGIC or version not in VERSIONS:
        raise BadCheckpoint(
            f"{where} is GGUF of version {version}, and {' and '.join(map(str, VERSIONS))} are read; convert it anew"
        )
    counts = [source.number("Q") for _ in range(2)]
    if not counts[0]:
        raise BadCheckpoint(f"{where} is a GGUF file without a tensor; take another copy")
    if max(counts) > MAX_ENTRIES:
        raise source.fail(f"it has {max(counts)} tensors or entries, and at most {MAX_ENTRIES} are read")
    entries = _entries(source, counts[1])
    described = [_description(source) for _ in range(counts[0])]
    alignment = _alignment(entries, source)
    source.take(-len(source.raw) % alignment)
    data = len(source.raw)
    tensors = [_tensor(one, entries, data, size, source) for one in sorted(described, key=lambda one: one.offset)]
    _check_order(tensors, source)
    metadata = {key: value if isinstance(value, str) else repr(value) for key, value in entries.items()}
    return Header(bytes(source.raw), {tensor.name: tensor for tensor in tensors}, metadata)


def with_entry(header: Header, name: str, value: str) -> bytes:
    """All before the first tensor, with one more entry, a text, behind the others; offsets of tensors stay as they are.

    Raises:
        BadCheckpoint: there is such an entry.
    """
    import io

    if name in header.metadata:
        raise BadCheckpoint(f"the header has an entry {name} already")
    source = _Bytes(io.BytesIO(header.raw), len(header.raw), "the header")
    fixed = source.take(8)
    tensors = source.number("Q")
    count = source.number("Q")
    before = len(source.raw)
    entries = _entries(source, count)
    end = len(source.raw)
    for _ in range(tensors):
        _description(source)
    described = bytes(source.raw[end:])
    texts = [name.encode(), value.encode()]
    key, text = (struct.pack("<Q", len(one)) + one for one in texts)
    parts = [fixed, struct.pack("<QQ", tensors, count + 1), bytes(source.raw[before:end]), key]
    made = b"".join([*parts, struct.pack("<I", _TEXT), text, described])
    return made + bytes(-len(made) % _alignment(entries, source))


def _alignment(entries: dict[str, object], source: _Bytes) -> int:
    alignment = entries.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
        raise source.fail(f"its alignment is {alignment!r}")
    return alignment


def _entries(source: _Bytes, count: int) -> dict[str, object]:
    entries: dict[str, object] = {}
    for _ in range(count):
        name = source.text()
        if name in entries:
            raise source.fail(f"the entry {name[:60]!r} stands in it twice")
        entries[name] = _value(source, source.number("I"))
    return entries


def _value(source: _Bytes, code: int) -> object:
    if code in _NUMBERS:
        (value,) = struct.unpack(f"<{_NUMBERS[code]}", source.take(struct.calcsize(f"<{_NUMBERS[code]}")))
        return value
    if code == _TEXT:
        return source.text()
    if code != _LIST:
        raise source.fail(f"the value before byte {len(source.raw)} is of the type {code}, which the format has not")
    kind = source.number("I")
    count = source.number("Q")
    if kind in _NUMBERS:
        values = source.take(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
        return list(struct.unpack(f"<{count}{_NUMBERS[kind]}", values)) if count <= MAX_DIMENSIONS else []
    if kind != _TEXT:
        raise source.fail(f"the list before byte {len(source.raw)} is of the type {kind}, which no model needs")
    for _ in range(count):
        source.text()
    return []


@dataclass(frozen=True, slots=True)
class _Description:
    name: str
    dimensions: tuple[int, ...]
    code: int
    offset: int


def _description(source: _Bytes) -> _Description:
    name = source.text()
    count = source.number("I")
    if len(name) > MAX_NAME or count > MAX_DIMENSIONS:
        raise source.fail(f"the tensor {name[:60]!r} has a name or shape of a length that none has")
    dimensions = tuple(source.number("Q") for _ in range(count))
    return _Description(name, dimensions, source.number("I"), source.number("Q"))


def _tensor(one: _Description, entries: dict[str, object], data: int, size: int, source: _Bytes) -> TensorInfo:
    """The place of a tensor, which lies in the file."""
    if one.code not in TYPES:
        raise source.fail(f"{one.name!r} is of ggml's type {one.code}, and known are {_words(TYPES)}")
    kind = TYPES[one.code]
    shape = tuple(reversed(one.dimensions))
    columns = shape[-1] if shape else 1
    if columns % kind.block:
        raise source.fail(f"{one.name!r} is {kind.name} {list(shape)}, and {kind.block} values make a block")
    count = math.prod(shape)
    nbytes = count // kind.block * kind.nbytes
    start = data + one.offset
    if start + nbytes > size:
        raise source.fail(f"{one.name!r} ends at byte {start + nbytes}, and the file has {size}: it is truncated")
    original = entries.get(f"{ORIGINAL_SHAPE}{one.name}")
    if isinstance(original, list) and original:
        if not all(type(one) is int and one >= 0 for one in original) or math.prod(original) != count:
            raise source.fail(f"{one.name!r} has the shape {list(shape)}, and originally {original}")
        shape = tuple(original)
    return TensorInfo(one.name, kind.name, shape, start, start + nbytes)


def _check_order(tensors: list[TensorInfo], source: _Bytes) -> None:
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise source.fail("a name stands in it twice")
    for before, after in pairwise(tensors):
        if after.start < before.end:
            raise source.fail(f"{after.name!r} begins at byte {after.start}, within {before.name!r}")


def _words(types: Iterable[int]) -> str:
    return ", ".join(TYPES[code].name for code in types)
