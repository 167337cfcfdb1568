"""The transformer in one safetensors file: as it is, or with codes and scales beside each other.

Invariant: a tensor that is not quantised has the dtype, shape and bytes that it has in the shards. All are streamed, so
memory does not grow with the model but for the float32 scales, some bytes a row.

Order: stored tensors as safetensors itself has them, the widest dtype first and then by name. Where weights are
quantised: codes behind them, with what has 8 bits beside them, module by module; then the float32 scales; and last the
stored tensors behind which no float32 could begin. So each is aligned, and a matrix is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lora_fuse.checkpoint import Header, dtypes
from lora_fuse.errors import Unquantisable
from lora_fuse.exports.export_contents import Contents, Matrix, Stored, read_blocks
from lora_fuse.exports.making import Encode, made_in_order, naming, octets
from lora_fuse.machine import FileRecord, direct_io
from lora_fuse.quantisation import FORMATS

ALIGNED = 4  # bytes of a float32 scale


def write(
    contents: Contents,
    codec: str | None,
    path: Path,
    matrix: Matrix,
    encode: Encode,
    progress: Callable[[int], None],
) -> FileRecord:
    """Write a file; `progress` gets the bytes just written.

    Raises:
        BadCheckpoint: a shard is not what its header says, or see `made_in_order`.
    """
    with (
        direct_io.HashingWriter(path, progress, direct=False) as file,
        made_in_order(contents.matrices, matrix, encode) as made,
    ):
        file.append(_header(contents, codec))
        front, back = _stored(contents)
        for block in _blocks(front):
            file.append(block)
        scales = []
        for module, parts in made:
            narrow, wide = _parts(contents, codec, module)
            for suffix in narrow:
                file.append(octets(parts[suffix]))
            scales += [octets(parts[suffix]) for suffix in wide]
        for data in scales:
            file.append(data)
        for block in _blocks(back):
            file.append(block)
        return file.finish()


def size(contents: Contents, codec: str | None) -> int:
    """Size in bytes of the file that `write` writes.

    Raises:
        Unquantisable: a shape cannot be held; the message names it.
    """
    _, data = _entries(contents, codec)
    return len(_header(contents, codec)) + data


def _stored(contents: Contents) -> tuple[list[Stored], list[Stored]]:
    """The stored tensors in order: those before the codes and the scales, and those behind."""
    stored = sorted(contents.stored, key=lambda pair: (-dtypes.DTYPES[pair[0].dtype].bits, pair[0].name))
    back = [pair for pair in stored if contents.matrices and pair[0].nbytes % ALIGNED]
    return [pair for pair in stored if pair not in back], back


def _blocks(stored: list[Stored]) -> Iterator[bytes]:
    for tensor, shard in stored:
        if shard is not None:
            yield from read_blocks(tensor, shard.path)


def _parts(contents: Contents, codec: str | None, module: str) -> tuple[list[str], list[str]]:
    """The suffixes of what is stored of a module: of 8 bits, and of more."""
    layout = _layout(contents, codec, module)
    narrow = [suffix for suffix, (dtype, _) in layout.items() if dtypes.DTYPES[dtype].bits == 8]
    return narrow, [suffix for suffix in layout if suffix not in narrow]


def _layout(contents: Contents, codec: str | None, module: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    with naming(module):
        return FORMATS[str(codec)].layout(contents.matrices[module])


def _entries(contents: Contents, codec: str | None) -> tuple[dict[str, object], int]:
    """The entries of the header, in order, and the bytes of all tensors."""
    entries: dict[str, object] = {}
    at = 0
    for name, dtype, shape in _listed(contents, codec):
        nbytes = _nbytes(dtype, shape)
        if dtype == "F32" and at % ALIGNED and nbytes:
            raise Unquantisable(
                f"the codes before the scale {name!r} end at byte {at}, and a float32 begins at a multiple of "
                f"{ALIGNED}: add the layers with an odd number of values to export.keep"
            )
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    return entries, at


def _listed(contents: Contents, codec: str | None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor in the order of the file."""
    front, back = _stored(contents)
    for tensor, _ in front:
        yield tensor.name, tensor.dtype, tensor.shape
    layouts = {module: _layout(contents, codec, module) for module in contents.matrices}
    parts = {module: _parts(contents, codec, module) for module in layouts}
    for which in (0, 1):
        for module, layout in layouts.items():
            for suffix in parts[module][which]:
                yield f"{module}.{suffix}", *layout[suffix]
    for tensor, _ in back:
        yield tensor.name, tensor.dtype, tensor.shape


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count * dtypes.DTYPES[dtype].bits // 8


def _header(contents: Contents, codec: str | None) -> bytes:
    entries, _ = _entries(contents, codec)
    return Header.pack(entries, {"format": "pt", **dict(sorted(contents.metadata.items()))})
