"""Matrices of weights, the same on every machine, and a small transformer of them."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Checkpoint, open_checkpoint
from tests.support import tiny

SHAPE = (48, 512)
Float32s = npt.NDArray[np.float32]


def matrix(kind: str = "normal", shape: tuple[int, int] = SHAPE, seed: int = 1) -> Float32s:
    """Weights of a layer's size; `outliers` has columns that are a hundred times as large."""
    values = np.random.Generator(np.random.Philox(seed)).integers(-(2**15), 2**15, (4, *shape)).sum(0)  # nearly normal
    made: Float32s = (values * 2.0**-21).astype(np.float32)
    if kind == "outliers":
        made[:, ::97] *= np.float32(100)
    return made


def qwen(folder: Path, dtype: npt.DTypeLike = tiny.BF16, **config: object) -> Checkpoint:
    """A transformer whose layers every format has room for, and one of each kind that is kept."""
    linears = {
        "transformer_blocks.0.attn.to_q": (32, 256),
        "transformer_blocks.0.img_mlp.net.0.proj": (96, 256),
        "transformer_blocks.0.img_mlp.net.2": (32, 512),
        "transformer_blocks.0.img_mod.1": (48, 256),
        "img_in": (32, 64),
    }
    tensors: dict[str, tiny.Array] = {"txt_norm.weight": np.ones(7, dtype)}
    for seed, (module, shape) in enumerate(linears.items()):
        tensors[f"{module}.weight"] = matrix(shape=shape, seed=seed).astype(dtype)
        tensors[f"{module}.bias"] = matrix(shape=(1, shape[0]), seed=seed)[0].astype(dtype)
    tiny.write_component(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel", **config}))
    return open_checkpoint(folder)
