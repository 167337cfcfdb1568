"""Tiny transformers under the names of their original checkpoints, and back by diffusers' own converter."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lora_fuse.models import Family, families
from tests.support.derived_names import convert, derive
from tests.support.key_styles import Tensors
from tests.tiny_models import tiny_transformer

FAMILY_OF = {"wan_21_i2v": "Wan 2.1", "wan_22": "Wan 2.2", "flux_1": "FLUX.1", "flux_2": "FLUX.2", "krea_2": "Krea 2"}
FAMILY_OF |= {"z_image": "Z-Image", "qwen_image_21": "Qwen-Image-2.1", "sdxl": "SDXL", "ltx_2": "LTX-2"}
RANK = 2


def family_of(name: str) -> Family:
    """The family of a tiny model."""
    (family,) = (one for one in families() if one.name == FAMILY_OF[name])
    return family


def weights(name: str) -> Tensors:
    """A tiny transformer's parameters in float32, in diffusers' names."""
    return {key: tensor.numpy() for key, tensor in tiny_transformer(name).state_dict().items()}


def original(family: Family, tensors: Tensors) -> Tensors:
    """The same parameters in the original names: pieces of the map, one after another."""
    pieces = derive(family)
    count: dict[str, int] = {}
    for parts in pieces.values():
        for name, place, _ in parts:
            count[str(name)] = max(count.get(str(name), 0), int(place) + 1)
    made: Tensors = {}
    blocks = {part for name in tensors for part in name.split(".") if part.isdigit()}
    for template, parts in pieces.items():
        for block in sorted(blocks) if "{}" in template else ["-"]:
            owners = [str(name).replace("{}", block) for name, _, _ in parts]
            if all(owner in tensors for owner in owners):
                cut = [
                    np.split(tensors[owner], count[str(name)])[int(place)]
                    for owner, (name, place, _) in zip(owners, parts, strict=True)
                ]
                made[template.replace("{}", block)] = _laid_out(template, np.concatenate(cut))
    return made


def _laid_out(template: str, values: Any) -> Any:
    return values.reshape(-1) if template.endswith(".mod.lin") and values.ndim == 2 and len(values) == 6 else values


def diffusers_names(family: Family, tensors: Mapping[str, Any]) -> Tensors:
    """Parameters in original names as diffusers' converter makes them."""
    given = {name: torch.from_numpy(np.array(values)) for name, values in tensors.items()}
    width = len(given["img_in.weight"]) if "img_in.weight" in given else None
    return {name: tensor.numpy() for name, tensor in convert(family, given, width).items()}


def random_lora(tensors: Tensors, seed: int = 3) -> tuple[Tensors, Tensors]:
    """Factors of rank 2, by module, of every weight that is a matrix or a kernel; and their products, by parameter."""
    rng = np.random.default_rng(seed)
    factors: Tensors = {}
    deltas: Tensors = {}
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.ndim > 1:
            down = rng.standard_normal((RANK, *weight.shape[1:]))
            up = rng.standard_normal((len(weight), RANK, *[1] * (weight.ndim - 2)))
            module = name.removesuffix(".weight")
            factors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            factors[f"{module}.alpha"] = np.array(1.0)
            deltas[name] = (up.reshape(len(up), -1) @ down.reshape(RANK, -1)).reshape(weight.shape) / RANK
    return factors, deltas


def spelt(factors: Tensors, prefix: str, *, flat: bool = False) -> Tensors:
    """The factors with a prefix, and with underscores for dots."""
    made = {}
    for key, values in factors.items():
        module, _, role = key.rpartition(".lora_") if ".lora_" in key else key.rpartition(".")
        role = f"lora_{role}" if ".lora_" in key else role
        made[f"{prefix}{module.replace('.', '_') if flat else module}.{role}"] = values
    return made


def total(tensors: Tensors, deltas: Tensors) -> Tensors:
    """The sums, float64."""
    return {name: values.astype(np.float64) + deltas.get(name, 0.0) for name, values in tensors.items()}


def differences(tensors: Tensors, prefix: str, seed: int = 5) -> tuple[Tensors, Tensors]:
    """Whole differences of all that is no matrix, under the keys that ComfyUI reads, by parameter and by key."""
    rng = np.random.default_rng(seed)
    keys: Tensors = {}
    deltas: Tensors = {}
    for name, values in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and values.ndim > 1:
            continue
        deltas[name] = rng.standard_normal(values.shape)
        roles = {"weight": f"{module}.diff", "bias": f"{module}.diff_b", "modulation": f"{module}.diff_m"}
        keys[prefix + roles.get(part, f"{name}.diff")] = deltas[name]
    return keys, deltas
