"""Layers that lose more by few bits than they save: a list for each class of transformer, with the source of each line.

A layer of a list stays in the dtype of the merge. Those called coarse are kept in formats of 8-bit floats and of fewer
bits only: int8 with a scale a row has room for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lora_fuse.errors import BadConfig


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Modules by shell patterns, and who found that they are to be kept."""

    patterns: tuple[str, ...]
    source: str
    coarse: bool = False


KEEP: Mapping[str, tuple[KeptLayers, ...]] = {
    "QwenImageTransformer2DModel": (
        KeptLayers(
            ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out"),
            "entry, time and output layers: vllm-project/vllm-omni#2795, where Qwen-Image in fp8 is right only so",
        ),
        KeptLayers(
            ("transformer_blocks.*.img_mod.*", "transformer_blocks.*.txt_mod.*"),
            "modulation: the same; int8 in ComfyUI 1.75e-2 off instead of 2.11e-2, fp8 4.19e-2 instead of 4.98e-2, "
            "nvfp4 1.46e-1 instead of 1.90e-1, two blocks of real shapes",
        ),
        KeptLayers(
            ("transformer_blocks.*.img_mlp.net.2",),
            "sgl-project/sglang#23155, by an ablation on Qwen-Image and Qwen-Image-Edit; vllm-project/vllm-omni#1034 "
            "leaves out all of img_mlp; fp8 3.91e-2 instead of 4.19e-2, as above",
            coarse=True,
        ),
    ),
}


def kept_layers(kind: str, modules: Iterable[str], more: Iterable[str] = (), *, coarse: bool) -> frozenset[str]:
    """The modules of a class of transformer that stay as they are; `more` are patterns that a user adds.

    Raises:
        BadConfig: one of these matches no module.
    """
    names = frozenset(modules)
    patterns = [pattern for row in KEEP.get(kind, ()) if coarse or not row.coarse for pattern in row.patterns]
    kept = {name for pattern in patterns for name in names if fnmatchcase(name, pattern)}
    for pattern in more:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise BadConfig(
                f"export.keep: {pattern!r} matches none of the {len(names)} layers of {kind} that have a matrix; they "
                f"have names as {min(names, default='')!r}"
            )
        kept |= found
    return frozenset(kept)
