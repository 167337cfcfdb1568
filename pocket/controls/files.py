"""Safetensors files, written anew with something changed; a file that was hard-linked to the base is replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def copy_of(
    path: Path, out: Path, change: Callable[[Tensors], Tensors], metadata: dict[str, str] | None = None
) -> Path:
    """Write a file's tensors, changed, to another one."""
    save_file(change(load_file(path)), out, metadata)
    return out


def rewrite(
    path: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, metadata: dict[str, str] | None = None
) -> None:
    """Change the tensors of a file; `metadata` takes the place of its header's."""
    metadata = read_metadata(path) if metadata is None else metadata
    copy_of(path, path.with_name(f"{path.name}.new"), change, metadata).replace(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a file's header."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def backwards(path: Path, out: Path) -> Path:
    """The same tensors in the opposite order, in the header and in the data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    turned = {}
    data = b""
    for name, entry in reversed(header.items()):
        begin, stop = entry["data_offsets"]
        turned[name] = entry | {"data_offsets": [len(data), len(data) + stop - begin]}
        data += content[end + begin : end + stop]
    text = json.dumps(turned, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return out


def without_alpha(tensors: Tensors) -> Tensors:
    """Leave alpha out: it counts as the rank."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}


def alpha_folded(tensors: Tensors) -> Tensors:
    """Multiply alpha / rank into `lora_up`: a power of two, so that nothing is rounded."""
    folded = without_alpha(tensors)
    for name, alpha in tensors.items():
        if name.endswith(".alpha"):
            module = name.removesuffix(".alpha")
            rank = folded[f"{module}.lora_down.weight"].shape[0]
            up = f"{module}.lora_up.weight"
            folded[up] = folded[up] * (alpha.item() / rank)
    return folded


def in_float32(tensors: Tensors) -> Tensors:
    """Store the same values wider."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def in_peft_names(tensors: Tensors) -> Tensors:
    """Rename as diffusers does, without alpha, which it keeps in the header."""
    roles = {"lora_down": "lora_A", "lora_up": "lora_B"}
    renamed = {}
    for name, tensor in without_alpha(tensors).items():
        module, role, _ = name.rsplit(".", 2)
        renamed[f"transformer.{module}.{roles[role]}.weight"] = tensor
    return renamed


def peft_metadata(path: Path) -> dict[str, str]:
    """The header's entry in which diffusers keeps rank and alpha, of a file with one alpha for all modules."""
    tensors = load_file(path)
    modules = sorted({name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")})
    (alpha,) = {tensors[f"{module}.alpha"].item() for module in modules}
    (rank,) = {tensors[f"{module}.lora_down.weight"].shape[0] for module in modules}
    targets = sorted({module.split(".", 2)[2] for module in modules})
    config = {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": targets}
    return {"lora_adapter_metadata": json.dumps(config)}
