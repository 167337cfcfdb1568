"""The tensors of a shard whose codes are decoded: names stay, codes become bfloat16, and their scales are gone. Pure.

Laid out as safetensors itself does it: the widest dtype first, so that all are aligned, then by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from lora_fuse.checkpoint import PROVENANCE, Checkpoint, Header, Shard, TensorInfo, dtypes
from lora_fuse.checkpoint.stored import StoredMatrix, StoredWeights
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import files

DECODED = "BF16"  # the dtype that codes are written in
LISTS_LAYERS = "_quantization_metadata"  # an entry of a header that is true of codes only
INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class DecodedTensor:
    """A tensor of the merged shard, and what it is made of: one of the base's, which may be codes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo
    stored: StoredMatrix | None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * dtypes.DTYPES[self.dtype].bits // 8


def decoded_tensors(shard: Shard, stored: StoredWeights) -> list[DecodedTensor]:
    """The tensors of a merged shard, in the order of the file."""
    made = []
    beside = stored.beside
    for name, tensor in shard.header.tensors.items():
        if name in beside:
            continue
        matrix = stored.matrices.get(name)
        dtype = tensor.dtype if matrix is None else DECODED
        made.append(DecodedTensor(name, dtype, tensor.shape, tensor, matrix))
    return sorted(made, key=lambda tensor: (-dtypes.DTYPES[tensor.dtype].bits, tensor.name))


def decoded_header(shard: Shard, tensors: Iterable[DecodedTensor], provenance: str) -> bytes:
    """Length and JSON of the merged shard's header; entries of the base's that are no GGUF's stay.

    Raises:
        BadCheckpoint: see `Header.pack`.
    """
    entries = {}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    kept = {} if shard.is_gguf else shard.header.metadata
    metadata = {name: value for name, value in kept.items() if name != LISTS_LAYERS}
    return Header.pack(entries, {"format": "pt", **metadata, PROVENANCE: provenance})


def decoded_size(shard: Shard, stored: StoredWeights, provenance: str) -> int:
    """Size in bytes of a merged shard."""
    tensors = decoded_tensors(shard, stored)
    return len(decoded_header(shard, tensors, provenance)) + sum(tensor.nbytes for tensor in tensors)


def decoded_index(checkpoint: Checkpoint, stored: StoredWeights) -> dict[str, bytes]:
    """The index of the merged shards, by its POSIX path, if the base has one: without scales, with the new size.

    Raises:
        BadCheckpoint: the base's cannot be read.
    """
    shards = {PurePosixPath(shard.relative): shard for shard in checkpoint.shards}
    for name in checkpoint.others:
        if not name.endswith(INDEX) or PurePosixPath(name).parent not in {path.parent for path in shards}:
            continue
        index = files.read_json(checkpoint.locate(name), dict, BadCheckpoint, "fetch the base again")
        listed: Mapping[str, str] = index["weight_map"]
        if set(listed.values()) != {path.name for path in shards}:
            continue
        tensors = [tensor for shard in shards.values() for tensor in decoded_tensors(shard, stored)]
        index["weight_map"] = {key: file for key, file in listed.items() if key not in stored.beside}
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(tensor.nbytes for tensor in tensors)}
        return {name: (json.dumps(index, indent=2) + "\n").encode()}
    return {}
