"""Renders each case from the merged checkpoint and from the base with the LoRAs unfused, in one process.

Then once more unfused with its weights moved by one rounding, which gives the noise floor; and, if asked, from the base
alone at its own settings, to show what the LoRA saves. Merged and unfused transformer are never in memory together;
text encoder, VAE, tokenizer and processor are loaded once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import OutOfMemory
from lora_fuse.fusion import Plan
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.noise_floor import jitter
from lora_fuse.pictures.picture import Rendered
from lora_fuse.pictures.placement import advice, place
from lora_fuse.pictures.render import (
    Pipeline,
    check_pictures,
    load_pipeline,
    make_scheduler,
    open_picture,
    render,
    shared_components,
)
from lora_fuse.pictures.render_progress import RenderProgress
from lora_fuse.pictures.unfused_lora import attach
from lora_fuse.recipe import Recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of all sides: pipeline class, sampling, scheduler (empty: the folder's own), placement, dtype.

    `baseline` is the sampling of the base alone; None leaves that side out.
    """

    pipeline: str
    sampling: Sampling
    scheduler: Mapping[str, Any]
    placement: str
    dtype: str
    baseline: Sampling | None = None

    @staticmethod
    def of(recipe: Recipe, *, baseline: bool | None = None) -> Setup:
        """Read both sides' settings from a recipe; `baseline` None leaves it to the recipe to render the base alone."""
        base = recipe.base
        regress = recipe.regress
        alone = regress.baseline if baseline is None else baseline
        return Setup(
            base.pipeline,
            Sampling(**recipe.sampling.usage, condition_area=base.condition_area),
            recipe.scheduler_config,
            regress.placement,
            regress.dtype,
            Sampling(**base.sampling.usage, condition_area=base.condition_area) if alone else None,
        )

    @property
    def sides(self) -> tuple[Sampling, ...]:
        """Sampling of each side: merged, unfused, the noise floor, and the base alone if it is asked for."""
        return (*[self.sampling] * 3, *([self.baseline] if self.baseline else []))


@dataclass(frozen=True, slots=True)
class Pair:
    """One case, rendered from the merged checkpoint and from base + LoRA, and what belongs to it.

    `floor` is base + LoRA again with weights moved by one rounding; `unfused_by` is what `unfused_lora.attach`
    returned; `baseline` is the base alone.
    """

    case: Case
    merged: Rendered
    unfused: Rendered
    floor: Rendered
    unfused_by: str
    baseline: Rendered | None = None


@dataclass(frozen=True, slots=True)
class References:
    """Pictures of one run that a merge is compared with, one a case and side; `unfused_by` as in `Pair`."""

    unfused: list[Rendered]
    floor: list[Rendered]
    baseline: Sequence[Rendered | None]
    unfused_by: str


def check_cases(cases: Iterable[Case], setup: Setup) -> None:
    """Open every input picture and count them: nothing is loaded or rendered for a run that cannot end well.

    Raises:
        RenderFailed: a picture is missing or none, or their number does not suit the pipeline.
    """
    for case in cases:
        check_pictures(setup.pipeline, case)
        for path in case.images:
            open_picture(path, case)


def render_pairs(
    merged: Path,
    plan: Plan,
    cases: Sequence[Case],
    setup: Setup,
    watch: RenderProgress | None = None,
    shared: Mapping[str, object] | None = None,
) -> list[Pair]:
    """Render every case from both sides.

    The merged side is loaded as a user would load it, with the scheduler that lies in the repository; the unfused side
    is the plan's base with the recipe's scheduler, so a wrong scheduler in the repository shows. `shared` are parts of
    the base's pipeline that are loaded already, see `shared_components`.

    Raises:
        RenderFailed: a side cannot be loaded or run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    watch = watch or RenderProgress()
    watch.loads("merged")
    pipe = load_pipeline(merged, setup.pipeline, dtype=setup.dtype, shared=shared)
    ours = render_all(pipe, cases, setup.sampling, setup.placement, side="merged", watch=watch)
    shared = shared_components(pipe)
    drop_transformer(pipe)
    theirs = render_references(plan, cases, setup, shared, watch)
    return pair_up(cases, ours, theirs)


def pair_up(cases: Sequence[Case], merged: Sequence[Rendered], references: References) -> list[Pair]:
    """Join each case's merged picture with its references; all are in the order of the cases."""
    sides = zip(cases, merged, references.unfused, references.floor, references.baseline, strict=True)
    by = references.unfused_by
    return [Pair(case, one, unfused, floor, by, alone) for case, one, unfused, floor, alone in sides]


def render_references(
    plan: Plan,
    cases: Sequence[Case],
    setup: Setup,
    shared: Mapping[str, object] | None = None,
    watch: RenderProgress | None = None,
) -> References:
    """Render every case from the base alone if asked, with the LoRAs beside it, and with its weights moved.

    Raises:
        RenderFailed: see `render_pairs`.
        OutOfMemory: see `render_pairs`.
    """
    watch = watch or RenderProgress()
    watch.loads("the base")
    load = partial(load_pipeline, plan.checkpoint.root, setup.pipeline, dtype=setup.dtype)
    pipe = load(shared=shared)
    alone: Sequence[Rendered | None] = [None] * len(cases)
    if setup.baseline is not None:  # as its authors run it: no LoRA, its own scheduler, steps and CFG
        alone = render_all(pipe, cases, setup.baseline, setup.placement, side="base alone", watch=watch)
        shared = shared_components(pipe)
        drop_transformer(pipe)
        pipe = load(shared=shared)
    if setup.scheduler:
        pipe.register_modules(scheduler=make_scheduler(setup.scheduler))
    by = attach_beside(pipe, plan)
    unfused = render_all(pipe, cases, setup.sampling, setup.placement, side="unfused", watch=watch)
    jitter(pipe.transformer, plan.targets, _rounded_to(plan, setup))
    floor = render_all(pipe, cases, setup.sampling, setup.placement, side="floor", watch=watch)
    drop_transformer(pipe)
    return References(unfused, floor, alone, by)


def _rounded_to(plan: Plan, setup: Setup) -> list[torch.dtype]:
    """The dtypes that the changed weights are rounded to, in memory and on disk."""
    import torch

    stored = {target.tensor.dtype for target in plan.targets.values()}
    return [getattr(torch, setup.dtype), *(dtypes.DTYPES[name].torch for name in stored)]


def attach_beside(pipe: Pipeline, plan: Plan) -> str:
    """Attach the LoRAs while the parts that are placed already are out of sight.

    diffusers takes what accelerate has spread over GPUs for offloaded, and would then offload the transformer too.
    """
    placed = shared_components(pipe)
    pipe.register_modules(**dict.fromkeys(placed))
    by = attach(pipe, plan)
    pipe.register_modules(**placed)
    return by


def render_all(
    pipe: Pipeline,
    cases: Iterable[Case],
    sampling: Sampling,
    placement: str,
    *,
    side: str = "",
    watch: RenderProgress | None = None,
) -> list[Rendered]:
    """Place a pipeline that was loaded on the CPU, and render every case with it; `side` is its name in the progress.

    Raises:
        RenderFailed: it cannot be run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    watch = watch or RenderProgress()
    rendered = []
    place(pipe, placement)
    try:
        for case in cases:
            with watch.picture(side, case.name, sampling) as on_step:
                rendered.append(render(pipe, case, sampling, on_step))
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}, {advice(placement)}") from error
    return rendered


def drop_transformer(pipe: Pipeline) -> None:
    """Give the memory back before the other transformer is loaded."""
    import torch

    pipe.register_modules(transformer=None)
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU it does nothing
