"""Tiny real checkpoints and LoRAs for tests, made in a moment with safetensors itself."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from lora_fuse.recipe.sections import Source

Array = npt.NDArray[np.generic]

BLOCKS = 2
LINEARS = {"attn.to_q": (24, 16), "attn.to_out.0": (16, 24), "img_mlp.net.0.proj": (64, 16)}
BF16 = np.dtype(ml_dtypes.bfloat16)


def weights(dtype: npt.DTypeLike = BF16, seed: int = 0) -> dict[str, Array]:
    """The tensors of a tiny transformer: linears with bias, and a norm."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {"norm.weight": np.ones(16, dtype=dtype)}
    for block in range(BLOCKS):
        for linear, shape in LINEARS.items():
            name = f"transformer_blocks.{block}.{linear}"
            made[f"{name}.weight"] = (rng.standard_normal(shape) / 4).astype(dtype)
            made[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(dtype)
    return made


def write_component(folder: Path, tensors: Mapping[str, Array], shards: int = 2) -> Path:
    """A component folder: config.json, shards and their index (one file and no index for a single shard)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Tiny"}) + "\n")
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for index in range(shards):
        filename = f"{stem}-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {
            name: tensors[name] for name in names[index * len(names) // shards : (index + 1) * len(names) // shards]
        }
        save_file(part, folder / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, filename))
    index_json = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": weight_map,
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index_json) + "\n")
    return folder


def write_pipeline(folder: Path, tensors: Mapping[str, Array], shards: int = 2) -> Path:
    """A pipeline folder with that transformer, a small VAE file, a scheduler and files that must stay behind."""
    write_component(folder / "transformer", tensors, shards)
    index = {
        "_class_name": "QwenImageEditPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index) + "\n")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler) + "\n")
    (folder / "vae").mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").write_text("{}\n")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("the base's card\n")
    return folder


def lora_tensors(style: str = "lightning", rank: int = 4, alpha: float | None = 2.0, seed: int = 7) -> dict[str, Array]:
    """A LoRA for every linear of `weights`, in the key style of lightx2v or of diffusers/PEFT."""
    down, up = {
        "lightning": ("{}.lora_down.weight", "{}.lora_up.weight"),
        "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
        "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    }[style]
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for block in range(BLOCKS):
        for linear, (out_features, in_features) in LINEARS.items():
            name = f"transformer_blocks.{block}.{linear}"
            made[down.format(name)] = (rng.standard_normal((rank, in_features)) / 4).astype(np.float32)
            made[up.format(name)] = (rng.standard_normal((out_features, rank)) / 4).astype(np.float32)
            if alpha is not None:
                key = down.format(name).replace(".lora_down.weight", ".alpha").replace(".lora_A.weight", ".alpha")
                made[key] = np.array(alpha, dtype=np.float32)
    return made


def write_lora(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata=metadata)
    return path


def on_hub(repo_id: str, revision: str = "main") -> Source:
    return Source(repo_id=repo_id, path=None, revision=revision)


def in_folder(path: Path) -> Source:
    return Source(repo_id=None, path=str(path), revision=None)
