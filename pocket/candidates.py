"""New versions of pocket's LoRA to try a validation on, three of them broken: ``python -m pocket.candidates [FOLDER]``.

A good one lies beside the current one already: `pocket-lightning-4steps-v1.safetensors` is another training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lora_fuse.cli import guarded
from pocket.controls.files import Tensors, copy_of, without_alpha

LORA = Path("pocket/lora/pocket-lightning-4steps-v2.safetensors")
FOLDER = Path("build/candidates")
HEADS = 5  # of pocket's transformer, pocket/model/transformer/config.json


def without_effect(tensors: Tensors) -> Tensors:
    """Every `lora_up` is zero, as it is before training."""
    return {name: torch.zeros_like(tensor) if "lora_up" in name else tensor for name, tensor in tensors.items()}


def for_another_base(tensors: Tensors, heads: int = HEADS) -> Tensors:
    """The LoRA of a base that computes the same with its channels, heads and hidden units in another order.

    Names, shapes and norms are all those of the LoRA for this base: what another training of the base would be like.
    """
    generator = torch.Generator().manual_seed(0)
    orders: dict[str, torch.Tensor] = {}

    def order(kind: str, size: int) -> torch.Tensor:
        if kind not in orders:
            if kind.startswith("heads"):
                whole = torch.randperm(heads, generator=generator)
                orders[kind] = (whole[:, None] * (size // heads) + torch.arange(size // heads)).reshape(-1)
            else:
                orders[kind] = torch.randperm(size, generator=generator)
        return orders[kind]

    moved = {}
    for name, tensor in tensors.items():
        inside, outside = _axes(name)
        if name.endswith("lora_down.weight"):
            moved[name] = tensor[:, order(inside, tensor.shape[1])].contiguous()
        elif name.endswith("lora_up.weight"):
            moved[name] = tensor[order(outside, tensor.shape[0])].contiguous()
        else:
            moved[name] = tensor
    return moved


def _axes(name: str) -> tuple[str, str]:
    """What goes into a linear and what comes out: the stream, a block's heads or its hidden units."""
    block, _, linear = name.rpartition(".lora_")[0].partition(".attn.")
    if linear.startswith(("to_out", "to_add_out")):
        return f"heads {block}", "stream"
    if linear:
        return "stream", f"heads {block}"
    hidden = f"hidden {name.rpartition('.net.')[0]}"
    return (hidden, "stream") if ".net.2" in name else ("stream", hidden)


CANDIDATES: Mapping[str, Callable[[Tensors], Tensors]] = {
    "alpha_ignored": without_alpha,
    "other_base": for_another_base,
    "no_effect": without_effect,
}


def write(folder: Path) -> dict[str, Path]:
    """Write them all; their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: copy_of(LORA, folder / f"{name}.safetensors", change) for name, change in CANDIDATES.items()}


def main() -> int:
    """Write them and say where."""
    parser = argparse.ArgumentParser(prog="python -m pocket.candidates", description="broken LoRAs to validate")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, metavar="FOLDER")
    for path in write(parser.parse_args().folder).values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
