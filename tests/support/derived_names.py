"""The map of a family's names, derived from diffusers' own converter of checkpoints: ``python -m`` writes them all.

The converter is given tensors of numbers that say which row of which original parameter they are. It only renames,
splits, joins and swaps rows, so what comes out says of each diffusers parameter where its rows were.
"""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils

from lora_fuse.models import Family, families
from lora_fuse.models.name_maps import path_of

ROWS = 21504  # of every original parameter: FLUX.1's converter splits this many, and 2, 3, 6 and 7 divide it
BLOCK = "17"  # the number of the block that stands for all: no name of a module has it
Table = dict[str, list[list[str | int]]]


class Whatever(dict[str, torch.Tensor]):
    """A checkpoint that has every key that is asked for: FLUX.1's converter asks for each of every block."""

    def pop(self, key: str, *_: Any) -> torch.Tensor:
        return super().pop(key, torch.full((ROWS, 1), -1))


def convert(family: Family, tensors: dict[str, torch.Tensor], width: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors in original names as diffusers' converter makes them; `width` is a model's where FLUX.1's has its own."""
    assert family.converter is not None
    function: Callable[..., dict[str, torch.Tensor]] = getattr(single_file_utils, family.converter)
    if "config" in inspect.signature(function).parameters:  # of the UNet, which is part of a larger file
        whole = {f"{single_file_utils.LDM_UNET_KEY}{name}": tensor for name, tensor in tensors.items()}
        return function(whole, {"layers_per_block": 2, "addition_embed_type": "text_time"})
    if width is not None and family.name == "FLUX.1":
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count("inner_dim = 3072") == 1
        there = {**vars(single_file_utils)}
        exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), there)  # noqa: S102
        function = there[family.converter]
    return function(tensors)


def originals(family: Family) -> list[str]:
    """The templates of the original parameters, of all families with the same converter."""
    alike = [one for one in families() if one.converter == family.converter]
    modules = dict.fromkeys(module for one in alike for module in one.originals)
    named = [f"{module}.{part}" for module in modules for part in ("weight", "bias")]
    return [*named, *dict.fromkeys(name for one in alike for name in one.original_parameters)]


def derive(family: Family) -> Table:
    """The pieces of each original parameter, in order: diffusers parameter, place in it, and share of the rows."""
    names = originals(family)
    numbers = torch.arange(ROWS).reshape(-1, 1)
    tensors = {name.replace("{}", BLOCK): numbers + (at << 32) for at, name in enumerate(names)}
    converted = convert(family, Whatever(tensors))
    found: dict[str, list[tuple[int, str, int, int]]] = {}
    for name, values in converted.items():
        rows = values.flatten()
        if int(rows[0]) < 0:
            continue
        breaks = [0, *((rows[1:] - rows[:-1] != 1).nonzero().flatten() + 1).tolist(), len(rows)]
        for place, (start, end) in enumerate(pairwise(breaks)):
            at = int(rows[start])
            piece = (at & 0xFFFFFFFF, name.replace(f".{BLOCK}.", ".{}."), place, end - start)
            found.setdefault(names[at >> 32], []).append(piece)
    return {name: _shares(sorted(found[name])) for name in names if name in found}


def _shares(pieces: list[tuple[int, str, int, int]]) -> list[list[str | int]]:
    assert sum(piece[-1] for piece in pieces) == ROWS, pieces
    share = math.gcd(*(piece[-1] for piece in pieces))
    return [[name, place, rows // share] for _, name, place, rows in pieces]


def text_of(family: Family) -> str:
    """The file that holds a family's map."""
    lines = [f"    {json.dumps(name)}: {json.dumps(pieces)}" for name, pieces in derive(family).items()]
    head = f'{{\n  "converter": "{family.converter}",\n  "diffusers": "{diffusers.__version__}",\n  "pieces": {{\n'
    return head + ",\n".join(lines) + "\n  }\n}\n"


if __name__ == "__main__":
    for one in families():
        if one.originals and one.converter:
            Path(path_of(one.converter)).write_text(text_of(one), encoding="utf-8")
            print(path_of(one.converter))
