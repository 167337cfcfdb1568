"""Renders each case from the merged checkpoint and from the base with the LoRAs unfused, in one process.

Then once more unfused with its weights moved by one rounding, which gives the noise floor; and, if asked, from the base
alone at its own settings, to show what the LoRA saves. And of every export, with its weights in the merged transformer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion import Plan
from lora_fuse.models import pipeline_call
from lora_fuse.pictures.calls.call_arguments import call_of, check_case, check_sampling, open_picture
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.load_plan import (
    BaseSides,
    MergedSides,
    References,
    Shared,
    attach_beside,
    render_all,
    render_merged,
    share,
    share_both,
)
from lora_fuse.pictures.picture import Rendered
from lora_fuse.pictures.render_progress import RenderProgress
from lora_fuse.pictures.weights_in_place import Decoded
from lora_fuse.recipe import Recipe, sections

__all__ = [
    "BaseSides",
    "Decoded",
    "MergedSides",
    "Pair",
    "References",
    "Setup",
    "Shared",
    "attach_beside",
    "check_cases",
    "open_picture",
    "pair_up",
    "render_all",
    "render_merged",
    "render_pairs",
    "share",
    "share_both",
]


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of all sides: pipeline class, sampling, scheduler (empty: the folder's own), placement, dtype.

    `baseline` is the sampling of the base alone; None leaves that side out. `compiled` says that the transformer's
    blocks are.
    """

    pipeline: str
    sampling: Sampling
    scheduler: Mapping[str, Any]
    placement: str
    dtype: str
    baseline: Sampling | None = None
    compiled: bool = False

    @staticmethod
    def of(recipe: Recipe, *, baseline: bool | None = None) -> Setup:
        """Read both sides' settings from a recipe; `baseline` None leaves it to the recipe to render the base alone."""
        base = recipe.base
        regress = recipe.regress
        alone = regress.baseline if baseline is None else baseline
        guidance = call_of(base.pipeline).guidance

        def sampling(of: sections.SamplingParams) -> Sampling:
            return Sampling(**of.usage, condition_area=base.condition_area, guidance=guidance)

        return Setup(
            base.pipeline,
            sampling(recipe.sampling),
            recipe.scheduler_config,
            regress.placement,
            regress.dtype,
            sampling(base.sampling) if alone else None,
            regress.compile,
        )

    @property
    def call(self) -> pipeline_call.PipelineCall:
        """The row of the pipeline's class."""
        return call_of(self.pipeline)

    @property
    def sides(self) -> tuple[Sampling, ...]:
        """Sampling of each side: merged, unfused, the noise floor, and the base alone if it is asked for."""
        return self.sides_with(0)

    def sides_with(self, exports: int) -> tuple[Sampling, ...]:
        """Sampling of each side, and of so many exports."""
        return (*[self.sampling] * (3 + exports), *([self.baseline] if self.baseline else []))


@dataclass(frozen=True, slots=True)
class Pair:
    """One case, rendered from the merged checkpoint and from base + LoRA, and what belongs to it.

    `floor` is base + LoRA again with weights moved by one rounding; `unfused_by` is what `unfused_lora.attach`
    returned; `baseline` is the base alone; `exports` are the merged transformer with an export's weights, by format:
    those that could be read.
    """

    case: Case
    merged: Rendered
    unfused: Rendered
    floor: Rendered
    unfused_by: str
    baseline: Rendered | None = None
    exports: Mapping[str, Rendered] = field(default_factory=dict)


def check_cases(cases: Iterable[Case], setup: Setup) -> None:
    """Open every input picture and count them: nothing is loaded or rendered for a run that cannot end well.

    Raises:
        RenderFailed: a picture is missing or none, or their number or the settings do not suit the pipeline.
    """
    for sampling in set(setup.sides):
        check_sampling(setup.call, sampling)
    for case in cases:
        check_case(setup.call, case)
        for path in case.images:
            open_picture(path, case)


def render_pairs(
    merged: Path,
    plan: Plan,
    cases: Sequence[Case],
    setup: Setup,
    watch: RenderProgress | None = None,
    shared: Shared | None = None,
    exports: Mapping[str, Decoded] | None = None,
) -> list[Pair]:
    """Render every case from both sides.

    The merged side is loaded as a user would load it, with the scheduler that lies in the repository; the unfused side
    is the plan's base with the recipe's scheduler, so a wrong scheduler in the repository shows. What they share is the
    merged repository's; `shared` is that of the base, where it is loaded already. Of `exports`, by format, one that
    cannot be read has no picture: its judgement says why.

    Raises:
        RenderFailed: a side cannot be loaded or run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    watch = watch or RenderProgress()
    ours_share, base_share = share_both(merged, plan, cases, setup, watch, shared)
    sides = MergedSides(merged, cases, setup, ours_share, watch)
    ours = sides.merged()
    exported = {}
    for name, read in (exports or {}).items():
        with suppress(BadCheckpoint):
            exported[name] = sides.exported(name, read())
    sides.drop()
    theirs = BaseSides(plan.checkpoint.root, cases, setup, base_share, watch).references(plan)
    paired = pair_up(cases, ours, theirs)
    return [
        replace(pair, exports={name: rendered[number] for name, rendered in exported.items()})
        for number, pair in enumerate(paired)
    ]


def pair_up(cases: Sequence[Case], merged: Sequence[Rendered], references: References) -> list[Pair]:
    """Join each case's merged picture with its references; all are in the order of the cases."""
    sides = zip(cases, merged, references.unfused, references.floor, references.baseline, strict=True)
    by = references.unfused_by
    return [Pair(case, one, unfused, floor, by, alone) for case, one, unfused, floor, alone in sides]
