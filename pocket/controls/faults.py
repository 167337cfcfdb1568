"""Faults that the gate has to catch: wrong merges, made by the library itself, loaded by diffusers and rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_fuse.checkpoint import PROVENANCE
from lora_fuse.lora import Selection
from lora_fuse.regression import verdicts
from pocket import LORAS, SCHEDULER
from pocket.controls import pictures
from pocket.controls.control import GATES, GOLDEN, UNFUSED, WEIGHTS, Control
from pocket.controls.files import Tensors, copy_of, read_metadata, rewrite, without_alpha
from pocket.controls.rig import Built, Rig

PICTURES = (UNFUSED, GOLDEN)
BLOCK = "transformer_blocks.2"
BROKEN = f"{BLOCK}.attn.to_q.weight"


def _scaled(scale: float, rig: Rig, folder: Path) -> Built:
    return rig.fused(folder, rig.plan(scale=scale))


def _swapped(file: str, rig: Rig, folder: Path) -> Built:
    return rig.fused(folder, rig.plan(rig.loras / file))


def _missing(pattern: str, rig: Rig, folder: Path) -> Built:
    return rig.fused(folder, rig.plan(selection=Selection(skip=(pattern,))))


def _twice(rig: Rig, folder: Path) -> Built:
    """Fuse a merge again. The library refuses it by a mark in its header, which is taken off here."""
    once = rig.merge(folder / "once")
    for path in (once / "transformer").glob("*.safetensors"):
        rewrite(path, metadata={key: value for key, value in read_metadata(path).items() if key != PROVENANCE})
    return rig.fused(folder, rig.plan(base=once))


def _default_scheduler() -> Mapping[str, object]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config: Mapping[str, Any] = FlowMatchEulerDiscreteScheduler().config
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _terminal_kept(rig: Rig, folder: Path) -> Built:
    scheduler = {**rig.setup.scheduler, "shift_terminal": SCHEDULER["shift_terminal"]}
    return rig.fused(folder, scheduler=scheduler)


def _grid(period: int, rig: Rig, _: Path) -> Built:
    return rig.repainted(partial(pictures.grid, period=period))


def _not_a_number(rig: Rig, folder: Path) -> Built:
    def break_it(tensors: Tensors) -> Tensors:
        if BROKEN in tensors:
            tensors[BROKEN][60, 60] = torch.nan
        return tensors

    merged = rig.merge(folder)
    for path in (merged / "transformer").glob("*.safetensors"):
        rewrite(path, break_it)
    return rig.built(merged)


def _regression(name: str, what: str, build: Callable[[Rig, Path], Built], *seen_by: str) -> Control:
    return Control(name, what, build, seen_by or GATES, verdicts.Verdict.REGRESSION)


def _weights_only(name: str, what: str, build: Callable[[Rig, Path], Built]) -> Control:
    """A fault too small for pictures to have to show it; the weights' gate has to."""
    return Control(name, what, build, (WEIGHTS,))


FAULTS = (
    _regression("scale 0", "nothing is added", partial(_scaled, 0.0)),
    _regression("scale .5", "half of it is added", partial(_scaled, 0.5)),
    _regression("scale .9", "nine tenths are added", partial(_scaled, 0.9)),
    _regression("other version", f"{LORAS['v1']} instead of v2", partial(_swapped, LORAS["v1"])),
    _regression("other LoRA", f"{LORAS['pastel']} instead", partial(_swapped, LORAS["pastel"])),
    _regression("fused twice", "the merge is fused again", _twice),
    _regression(
        "alpha ignored",
        "alpha / rank, here 1/2, counts as 1",
        lambda rig, folder: rig.fused(folder, rig.plan(copy_of(rig.lora, folder / "lora.safetensors", without_alpha))),
    ),
    _regression("block missing", f"{BLOCK} is left as it is", partial(_missing, f"{BLOCK}.*")),
    _regression(
        "default scheduler",
        "the repository has diffusers' defaults",
        lambda rig, folder: rig.fused(folder, scheduler=_default_scheduler()),
    ),
    _regression(
        "base's scheduler", "the repository keeps the base's", lambda rig, folder: rig.fused(folder, scheduler={})
    ),
    _regression("shift_terminal", "Lightning's, but for the base's .02", _terminal_kept),
    _regression("8 steps", "sampled in 8 steps instead of 4", lambda rig, _: rig.rerendered(steps=8), *PICTURES),
    _regression(
        "seed + 1",
        "other noise",
        lambda rig, _: rig.rerendered([replace(case, seed=case.seed + 1) for case in rig.cases]),
        *PICTURES,
    ),
    _regression("patch", "32 x 48 pixels moved by 8", lambda rig, _: rig.repainted(pictures.patch), *PICTURES),
    _regression("grid of 16", "one level, every 16 pixels", partial(_grid, 16), *PICTURES),
    _regression("grid of 8", "one level, every 8 pixels", partial(_grid, 8), *PICTURES),
    Control(
        "NaN",
        f"one weight of {BROKEN}, in a row that is not sampled",
        _not_a_number,
        PICTURES,
        verdicts.Verdict.INVALID,
    ),
    _weights_only("scale .97", "3% too little", partial(_scaled, 0.97)),
    _weights_only("scale .99", "1% too little", partial(_scaled, 0.99)),
    _weights_only("attn.to_q missing", f"one linear of {BLOCK}", partial(_missing, f"{BLOCK}.attn.to_q")),
    _weights_only("img_mlp.net.2 missing", f"one linear of {BLOCK}", partial(_missing, f"{BLOCK}.img_mlp.net.2")),
)
