"""The transformer in one safetensors file, with the keys that ComfyUI reads.

For Qwen-Image ComfyUI has the module names of diffusers (comfy/ldm/qwen_image/model.py), after the prefix that its own
checkpoints have for the diffusion model. It tells the models apart by their keys: one that was trained with
`zero_cond_t` (Qwen-Image-Edit-2511) needs an empty tensor `__index_timestep_zero__` (comfy/model_detection.py), or its
input pictures are treated in the older way.

Invariant: every tensor has the dtype, shape and bytes that it has in the shards; tensors are streamed, so memory does
not grow with the model. They are laid out as safetensors itself lays them out: the widest dtype first (so that all
are aligned), then by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_fuse.checkpoint import Checkpoint, Header, Shard, TensorInfo, dtypes
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import FileRecord, direct_io

BLOCK = 8 << 20  # bytes read at once


@dataclass(frozen=True, slots=True)
class Layout:
    """ComfyUI's names for the tensors of a transformer class.

    `flags` are empty tensors that stand for a setting of `config.json` that is true.
    """

    prefix: str
    flags: Mapping[str, str]


LAYOUTS: Mapping[str, Layout] = {
    "QwenImageTransformer2DModel": Layout("model.diffusion_model.", {"zero_cond_t": "__index_timestep_zero__"}),
}


def write_single_file(
    checkpoint: Checkpoint, path: Path, metadata: Mapping[str, str], progress: Callable[[int], None]
) -> FileRecord:
    """Write the merged transformer to one file, with `metadata` in its header; `progress` gets the bytes just written.

    Raises:
        BadCheckpoint: ComfyUI's names of such a model are not known, or a shard is not what its header says.
    """
    tensors = _tensors(checkpoint)
    with direct_io.HashingWriter(path, progress, direct=False) as file:
        file.append(_header(tensors, metadata))
        for tensor, shard in tensors:
            for block in _read(tensor, shard):
                file.append(block)
        return file.finish()


def single_file_size(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> int:
    """Size in bytes of the file that `write_single_file` writes.

    Raises:
        BadCheckpoint: see `write_single_file`.
    """
    tensors = _tensors(checkpoint)
    return len(_header(tensors, metadata)) + sum(tensor.nbytes for tensor, _ in tensors)


def _tensors(checkpoint: Checkpoint) -> list[tuple[TensorInfo, Shard | None]]:
    """The tensors by their new names, in the order of the file; a flag is of no shard."""
    kind = str(checkpoint.config.get("_class_name"))
    if kind not in LAYOUTS:
        raise BadCheckpoint(
            f"{checkpoint.root} is a {kind}, and ComfyUI's keys are known for {', '.join(LAYOUTS)}; "
            "take single_file out of export.formats"
        )
    layout = LAYOUTS[kind]
    named: list[tuple[TensorInfo, Shard | None]] = [
        (replace(tensor, name=layout.prefix + name), shard)
        for shard in checkpoint.shards
        for name, tensor in shard.header.tensors.items()
    ]
    flags = [flag for setting, flag in layout.flags.items() if checkpoint.config.get(setting)]
    named += [(TensorInfo(layout.prefix + flag, "F32", (0,), 0, 0), None) for flag in flags]
    return sorted(named, key=lambda pair: (-dtypes.DTYPES[pair[0].dtype].bits, pair[0].name))


def _header(tensors: list[tuple[TensorInfo, Shard | None]], metadata: Mapping[str, str]) -> bytes:
    entries = {}
    at = 0
    for tensor, _ in tensors:
        offsets = [at, at + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    return Header.pack(entries, {"format": "pt", **dict(sorted(metadata.items()))})


def _read(tensor: TensorInfo, shard: Shard | None) -> Iterator[bytes]:
    if shard is None:
        return
    with shard.path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left:
            block = file.read(min(left, BLOCK))
            if not block:
                raise BadCheckpoint(f"{shard.path} ends within {tensor.name!r}; fuse again")
            left -= len(block)
            yield block
