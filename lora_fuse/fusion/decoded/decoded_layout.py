"""The tensors of a shard that are written in other dtypes: names stay, the scales of codes are gone.

Codes become bfloat16, or the dtype that a plan asks for, as floats do.

Laid out as safetensors itself does it: the widest dtype first, so that all are aligned, then by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from lora_fuse.checkpoint import PROVENANCE, Header, Shard, TensorInfo, dtypes
from lora_fuse.checkpoint.stored import StoredMatrix
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion.plan import Plan
from lora_fuse.machine import files

DECODED = "BF16"  # the dtype that codes are written in
LISTS_LAYERS = "_quantization_metadata"  # an entry of a header that is true of codes only
INDEX = ".safetensors.index.json"
DTYPE_KEYS = ("dtype", "torch_dtype")  # in a configuration: of today, and of before


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


def decoded_tensors(shard: Shard, plan: Plan) -> list[DecodedTensor]:
    """The tensors of a merged shard, in the order of the file."""
    made = []
    beside = plan.stored.beside if plan.stored else frozenset()
    matrices = plan.stored.matrices if plan.stored else {}
    for name, tensor in shard.header.tensors.items():
        if name in beside:
            continue
        matrix = matrices.get(name)
        dtype = plan.written(tensor) if matrix is None else plan.dtype or DECODED
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


def decoded_size(shard: Shard, plan: Plan) -> int:
    """Size in bytes of a merged shard."""
    tensors = decoded_tensors(shard, plan)
    return len(decoded_header(shard, tensors, plan.provenance)) + sum(tensor.nbytes for tensor in tensors)


def decoded_texts(plan: Plan) -> dict[str, bytes]:
    """The texts beside the weights that speak of their dtypes, as they have to be, by POSIX path.

    Raises:
        BadCheckpoint: the base's cannot be read.
    """
    return _index(plan) | _config(plan)


def _config(plan: Plan) -> dict[str, bytes]:
    """The component's configuration, if it names a dtype and that is another one now."""
    folders = {PurePosixPath(shard.relative).parent for shard in plan.checkpoint.shards}
    names = {(folder / "config.json").as_posix() for folder in folders}
    said = [key for key in DTYPE_KEYS if isinstance(plan.checkpoint.config.get(key), str)]
    if plan.dtype is None or not said:
        return {}
    content = {**plan.checkpoint.config, **dict.fromkeys(said, dtypes.DTYPES[plan.dtype].array_name)}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name in names & set(plan.checkpoint.others)}


def _index(plan: Plan) -> dict[str, bytes]:
    """The index of the merged shards, if the base has one: without scales, with the new size.

    Raises:
        BadCheckpoint: the base's cannot be read.
    """
    checkpoint = plan.checkpoint
    beside = plan.stored.beside if plan.stored else frozenset()
    shards = {PurePosixPath(shard.relative): shard for shard in checkpoint.shards}
    for name in checkpoint.others:
        if not name.endswith(INDEX) or PurePosixPath(name).parent not in {path.parent for path in shards}:
            continue
        index = files.read_json(checkpoint.locate(name), dict, BadCheckpoint, "fetch the base again")
        listed: Mapping[str, str] = index["weight_map"]
        if set(listed.values()) != {path.name for path in shards}:
            continue
        tensors = [tensor for shard in shards.values() for tensor in decoded_tensors(shard, plan)]
        index["weight_map"] = {key: file for key, file in listed.items() if key not in beside}
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(tensor.nbytes for tensor in tensors)}
        return {name: (json.dumps(index, indent=2) + "\n").encode()}
    return {}
