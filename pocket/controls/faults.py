"""What the gate has to catch. Every wrong merge is made by the library itself, loaded by diffusers and rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_fuse.checkpoint import PROVENANCE
from lora_fuse.lora import Selection
from lora_fuse.pictures import picture
from lora_fuse.regression import verdicts
from pocket.bench import STYLE
from pocket.controls import pictures
from pocket.controls.control import GATES, GOLDEN, UNFUSED, WEIGHTS, Built, Control
from pocket.controls.files import Tensors, copy_of, read_metadata, rewrite, without_alpha
from pocket.controls.rig import Rig
from pocket.model import SCHEDULER

FIRST_VERSION = "pocket-lightning-4steps-v1.safetensors"
PICTURES = (UNFUSED, GOLDEN)
BLOCK = "transformer_blocks.2"
BROKEN = f"{BLOCK}.attn.to_q.weight"


def _scaled(scale: float, rig: Rig, folder: Path) -> Built:
    return rig.built(rig.merge(folder / "merged", rig.plan(scale=scale)))


def _swapped(file: str, rig: Rig, folder: Path) -> Built:
    return rig.built(rig.merge(folder / "merged", rig.plan(rig.loras / file)))


def _twice(rig: Rig, folder: Path) -> Built:
    """The library refuses a base that is merged already; here the mark that it knows it by is taken off."""
    once = rig.merge(folder / "once")
    for path in (once / "transformer").glob("*.safetensors"):
        kept = {key: value for key, value in read_metadata(path).items() if key != PROVENANCE}
        rewrite(path, lambda tensors: tensors, kept)
    return rig.built(rig.merge(folder / "merged", rig.plan(base=once)))


def _alpha_ignored(rig: Rig, folder: Path) -> Built:
    lora = copy_of(rig.lora, folder / "lora.safetensors", without_alpha)
    return rig.built(rig.merge(folder / "merged", rig.plan(lora)))


def _missing(pattern: str, rig: Rig, folder: Path) -> Built:
    return rig.built(rig.merge(folder / "merged", rig.plan(selection=Selection(skip=(pattern,)))))


def _scheduler(choose: Callable[[Rig], Mapping[str, object]], rig: Rig, folder: Path) -> Built:
    return rig.built(rig.merge(folder / "merged", scheduler=choose(rig)))


def _default_scheduler(_: Rig) -> Mapping[str, object]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config: Mapping[str, Any] = FlowMatchEulerDiscreteScheduler().config
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _terminal_kept(rig: Rig) -> Mapping[str, object]:
    return {**rig.setup.scheduler, "shift_terminal": SCHEDULER["shift_terminal"]}


def _eight_steps(rig: Rig, _: Path) -> Built:
    return Built(rig.right, rig.render(rig.load(rig.right), steps=8))


def _next_seed(rig: Rig, _: Path) -> Built:
    return Built(rig.right, rig.render(rig.load(rig.right), [replace(case, seed=case.seed + 1) for case in rig.cases]))


def _damaged(change: Callable[[picture.Levels], picture.Levels], rig: Rig, _: Path) -> Built:
    return Built(rig.right, [pictures.changed(one, change) for one in rig.render(rig.load(rig.right))])


def _not_a_number(rig: Rig, folder: Path) -> Built:
    def break_one(tensors: Tensors) -> Tensors:
        if BROKEN in tensors:
            tensors[BROKEN][60, 60] = torch.nan
        return tensors

    merged = rig.merge(folder / "merged")
    for path in (merged / "transformer").glob("*.safetensors"):
        rewrite(path, break_one)
    return rig.built(merged)


def _regression(name: str, what: str, build: Callable[[Rig, Path], Built], *seen_by: str) -> Control:
    return Control(name, what, build, seen_by or GATES, verdicts.Verdict.REGRESSION)


def _weights_only(name: str, what: str, build: Callable[[Rig, Path], Built]) -> Control:
    """Too small for pictures to have to show it; the weights' gate has to."""
    return Control(name, what, build, (WEIGHTS,))


FAULTS = (
    _regression("scale 0", "nothing is added", partial(_scaled, 0.0)),
    _regression("scale .5", "half of it is added", partial(_scaled, 0.5)),
    _regression("scale .9", "nine tenths are added", partial(_scaled, 0.9)),
    _regression("other version", f"{FIRST_VERSION} instead of v2", partial(_swapped, FIRST_VERSION)),
    _regression("other LoRA", f"{STYLE} instead", partial(_swapped, STYLE)),
    _regression("fused twice", "the merge is fused again", _twice),
    _regression("alpha ignored", "alpha / rank, here 1/2, counts as 1", _alpha_ignored),
    _regression("block missing", f"{BLOCK} is left as it is", partial(_missing, f"{BLOCK}.*")),
    _regression("default scheduler", "the repository has diffusers' defaults", partial(_scheduler, _default_scheduler)),
    _regression("base's scheduler", "the repository keeps the base's", partial(_scheduler, lambda _: {})),
    _regression("shift_terminal", "Lightning's, but for the base's .02", partial(_scheduler, _terminal_kept)),
    _regression("8 steps", "sampled in 8 steps instead of 4", _eight_steps, *PICTURES),
    _regression("seed + 1", "other noise", _next_seed, *PICTURES),
    _regression("patch", "32 x 48 pixels moved by 8", partial(_damaged, pictures.patch), *PICTURES),
    _regression(
        "grid of 16", "one level, every 16 pixels", partial(_damaged, partial(pictures.grid, period=16)), *PICTURES
    ),
    _regression(
        "grid of 8", "one level, every 8 pixels", partial(_damaged, partial(pictures.grid, period=8)), *PICTURES
    ),
    Control(
        "NaN",
        f"one weight of {BROKEN}, in a row that is not sampled",
        _not_a_number,
        (UNFUSED, GOLDEN),
        verdicts.Verdict.INVALID,
    ),
    _weights_only("scale .97", "3% too little", partial(_scaled, 0.97)),
    _weights_only("scale .99", "1% too little", partial(_scaled, 0.99)),
    _weights_only("attn.to_q missing", f"one linear of {BLOCK}", partial(_missing, f"{BLOCK}.attn.to_q")),
    _weights_only("img_mlp.net.2 missing", f"one linear of {BLOCK}", partial(_missing, f"{BLOCK}.img_mlp.net.2")),
)
