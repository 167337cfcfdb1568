"""The transformer in one GGUF file (github.com/ggml-org/ggml, docs/gguf.md), header by gguf-py.

One file for ComfyUI-GGUF, which refuses one without `general.architecture`, for diffusers and for
stable-diffusion.cpp: bare names; matrices that are not quantised in the dtype of the merge; vectors in float32; flags
as empty tensors.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from lora_fuse.checkpoint import Shard, TensorInfo
from lora_fuse.errors import BadCheckpoint, Unquantisable, naming_extras
from lora_fuse.exports.export_contents import WEIGHT, Contents, Matrix, read_blocks, widened
from lora_fuse.exports.making import Encode, made_in_order, naming, octets
from lora_fuse.machine import FileRecord, direct_io

ALIGNMENT = 32  # bytes; the format's own where a file says nothing else
AS_STORED = ("BF16", "F16", "F32")  # dtypes whose names are ggml's as well


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file: its name, ggml's name of its type, its shape in numpy's order, and bytes.

    It is stored, in a shard or as a flag of none; or made of a `module`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    stored: TensorInfo | None = None
    shard: Shard | None = None
    module: str | None = None

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a stored tensor.

        Raises:
            BadCheckpoint: see `read_blocks`.
        """
        if self.stored is None or self.shard is None:
            return
        if self.stored.dtype == self.kind:
            yield from read_blocks(self.stored, self.shard.path)
        else:
            yield octets(widened(self.stored, self.shard.path))


def write(
    contents: Contents, kind: str, path: Path, matrix: Matrix, encode: Encode, progress: Callable[[int], None]
) -> FileRecord:
    """Write a file whose matrices are of ggml's type `kind`; `progress` gets the bytes just written.

    Raises:
        BadCheckpoint: a shard is not what its header says, or see `made_in_order`.
    """
    tensors = _tensors(contents, kind)
    with (
        direct_io.HashingWriter(path, progress, direct=False) as file,
        made_in_order(contents.matrices, matrix, encode) as made,
    ):
        file.append(_header(contents, tensors))
        for tensor in tensors:
            if tensor.module is None:
                for block in tensor.blocks():
                    file.append(block)
            else:
                module, parts = next(made)
                if module != tensor.module or parts["weight"].nbytes != tensor.nbytes:
                    raise BadCheckpoint(f"{tensor.name!r} has {parts['weight'].nbytes} bytes, not {tensor.nbytes}")
                file.append(octets(parts["weight"]))
            file.append(bytes(-tensor.nbytes % ALIGNMENT))
        return file.finish()


def size(contents: Contents, kind: str) -> int:
    """Size in bytes of the file that `write` writes.

    Raises:
        Unquantisable: a shape cannot be held; the message names it.
        BadCheckpoint: a tensor is of a dtype that GGUF has not.
    """
    tensors = _tensors(contents, kind)
    return len(_header(contents, tensors)) + sum(tensor.nbytes + -tensor.nbytes % ALIGNMENT for tensor in tensors)


def _tensors(contents: Contents, kind: str) -> list[GgufTensor]:
    """All tensors by name: the modules among them in the order of `Contents.matrices`."""
    made = []
    for module, shape in contents.matrices.items():
        with naming(module):
            nbytes = shape[0] * row_bytes(shape[1], kind)
        made.append(GgufTensor(module + WEIGHT, kind, shape, nbytes, module=module))
    stored = [_stored(tensor, shard) for tensor, shard in contents.stored]
    return sorted([*made, *stored], key=lambda tensor: tensor.module or tensor.name)


def _stored(tensor: TensorInfo, shard: Shard | None) -> GgufTensor:
    if tensor.dtype not in AS_STORED:
        raise BadCheckpoint(f"{tensor.name!r} is {tensor.dtype}, and GGUF here holds {', '.join(AS_STORED)}")
    if len(tensor.shape) > 1:
        return GgufTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, tensor, shard)
    return GgufTensor(tensor.name, "F32", tensor.shape or (1,), 4 * math.prod(tensor.shape), tensor, shard)


def row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of ggml's type `kind`.

    Raises:
        Unquantisable: the columns are no whole blocks.
    """
    library = _library()
    values, nbytes = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    if columns % values:
        raise Unquantisable(f"it has {columns} columns, and blocks of {values} do not divide them")
    return columns // int(values) * int(nbytes)


def _header(contents: Contents, tensors: list[GgufTensor]) -> bytes:
    """All before the first tensor's data, padded."""
    library = _library()
    writer = library.GGUFWriter(None, contents.layout.architecture)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    for key, value in sorted(contents.metadata.items()):
        writer.add_string(key, value)
    for tensor in tensors:
        kind = library.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    header = io.BytesIO()
    writer.fout = [header]  # of its own files it would make one
    writer.state = library.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    data = header.getvalue()
    return data + bytes(-len(data) % ALIGNMENT)


def _library() -> ModuleType:
    with naming_extras("a GGUF file"):
        import gguf
    library: ModuleType = gguf
    return library
