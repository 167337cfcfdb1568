"""Make a checkpoint with Qwen-Image-Edit's real tensor names, shapes and dtype, and a LoRA that fits it.

A benchmark needs the shapes of the 40.9 GB transformer, not its weights: 8 of its 60 blocks are 5.5 GB and
are written in seconds. Names and shapes come from diffusers' own model class on the meta device, so they
cannot drift from the real ones. Values are weight-like (normal, standard deviation 0.02) but not
independent: one block of 17 million random bfloat16 numbers is made once, and every tensor is cut from it
where the last one stopped. The length of the block is a prime, so two rows, or two tensors, do not start
alike.

Memory does not grow with the size: nothing bigger than the block is ever held.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_fuse.machine import interrupts
from pocket import LORA_TARGETS

Shapes = dict[str, tuple[int, ...]]
Fill = Callable[[str, int], Iterable[memoryview]]  # a tensor's name and size in bytes -> its data

ITEM = 2  # bytes of a bfloat16
SHARD_LIMIT = 5_000_000_000  # bytes; the published checkpoint is cut so, into 9 shards


class Noise:
    """An endless supply of weight-like bfloat16 numbers, cut in turn from one random block."""

    LENGTH = 16_777_213  # numbers; the largest prime below 2**24, 34 MB as bfloat16
    STD = 0.02

    def __init__(self, seed: int, length: int = LENGTH) -> None:
        values = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
        values *= self.STD
        self._bytes = values.astype(ml_dtypes.bfloat16).view(np.uint8).data
        self._at = 0

    def take(self, nbytes: int) -> Iterator[memoryview]:
        """The next `nbytes` bytes, in pieces no longer than the block."""
        while nbytes:
            piece = self._bytes[self._at : self._at + nbytes]
            self._at = (self._at + len(piece)) % len(self._bytes)
            nbytes -= len(piece)
            yield piece


def qwen_image_edit_config(blocks: int = 60) -> dict[str, Any]:
    """The published configuration of Qwen/Qwen-Image-Edit's transformer with `blocks` blocks."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": blocks,
        "out_channels": 16,
        "patch_size": 2,
    }


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the model that `config` describes, in the order in which diffusers saves them."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def lora_shapes(shapes: Mapping[str, tuple[int, ...]], rank: int) -> Shapes:
    """Keys and shapes of a Lightning LoRA for all 12 targets of every block of `shapes`."""
    keys: Shapes = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module != name and module.startswith("transformer_blocks.") and module.split(".", 2)[2] in LORA_TARGETS:
            keys[f"{module}.lora_down.weight"] = (rank, shape[1])
            keys[f"{module}.lora_up.weight"] = (shape[0], rank)
            keys[f"{module}.alpha"] = ()
    return keys


def plan_shards(shapes: Mapping[str, tuple[int, ...]], limit: int = SHARD_LIMIT) -> dict[str, Shapes]:
    """Split a model as diffusers does: in order, a new shard where the next tensor would pass `limit` bytes.

    Returns:
        The tensors of each shard by its file name.
    """
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * ITEM
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    if len(shards) == 1:
        return {"diffusion_pytorch_model.safetensors": shards[0]}
    return {
        f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], fill: Fill) -> None:
    """Stream bfloat16 tensors into a safetensors file, sorted by name as the reference writer does.

    Args:
        path: the file to write.
        shapes: its tensors.
        fill: gives the data of a tensor from its name and size in bytes.
    """
    names = sorted(shapes)
    sizes = [math.prod(shapes[name]) * ITEM for name in names]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in zip(names, sizes, strict=True):
        entries[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in zip(names, sizes, strict=True):
            for piece in fill(name, size):
                file.write(piece)


def make_base(folder: Path, config: Mapping[str, Any], noise: Noise, limit: int = SHARD_LIMIT) -> Shapes:
    """Write a transformer folder that diffusers can load: `config.json`, shards, an index for several shards.

    Returns:
        Names and shapes of its tensors.

    Raises:
        FileExistsError: the folder exists; shards of two checkpoints must not mix.
    """
    shapes = tensor_shapes(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = plan_shards(shapes, limit)
    for filename, shard in shards.items():
        write_safetensors(folder / filename, shard, lambda _, nbytes: noise.take(nbytes))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(math.prod(shape) * ITEM for shape in shapes.values())},
            "weight_map": {name: filename for filename, shard in shards.items() for name in sorted(shard)},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text, encoding="utf-8")
    return shapes


def make_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, alpha: float, noise: Noise) -> None:
    """Write a LoRA in the Lightning format for a base's `shapes`.

    Its keys are `X.lora_down.weight`, `X.lora_up.weight` and `X.alpha` for each target X.
    """
    constant = np.array([alpha], dtype=ml_dtypes.bfloat16).view(np.uint8).data

    def fill(name: str, nbytes: int) -> Iterable[memoryview]:
        return [constant] if name.endswith(".alpha") else noise.take(nbytes)

    write_safetensors(path, lora_shapes(shapes, rank), fill)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_checkpoint", description="Make a checkpoint with real shapes."
    )
    parser.add_argument("out", type=Path, help="folder for transformer/ and lora.safetensors")
    parser.add_argument("--blocks", type=int, required=True, help="transformer blocks; the real model has 60")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--max-shard-bytes", type=float, default=SHARD_LIMIT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder = args.out / "transformer"
    if folder.exists():
        parser.error(f"{folder} exists; remove it or name another folder")
    noise = Noise(args.seed)
    shapes = make_base(folder, qwen_image_edit_config(args.blocks), noise, int(args.max_shard_bytes))
    make_lora(args.out / "lora.safetensors", shapes, args.rank, args.alpha, noise)


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
