"""Renders what a new version of a LoRA is judged by, in one process, and measures it.

Six sides of every case: the new version merged, and unfused with its noise floor; the current version; neither; and for
a LoRA that saves steps the base alone at its own settings, its teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_fuse.fusion.plan import Plan
from lora_fuse.pictures.metrics import comb_db, latents_l2, to_levels
from lora_fuse.pictures.pairs import (
    Pair,
    Setup,
    attach_beside,
    drop_transformer,
    pair_up,
    render_all,
    render_references,
)
from lora_fuse.pictures.render import Case, Rendered, load_pipeline, make_scheduler, shared_components
from lora_fuse.pictures.render_progress import Task, Watch
from lora_fuse.regression.case_judgement import judge_pairs
from lora_fuse.regression.verdicts import FLOAT32_NOISE, CaseResult, Golden, Rules
from lora_fuse.studies.validation.effect import effect, gain, noise_sigma
from lora_fuse.studies.validation.evidence import CaseEvidence


@dataclass(frozen=True, slots=True)
class Sides:
    """The pictures of one case, as they were rendered; `teacher` and `current` may be missing."""

    pair: Pair
    plain: Rendered
    current: Rendered | None

    @property
    def teacher(self) -> Rendered | None:
        """The base alone at its own steps."""
        return self.pair.baseline

    @property
    def name(self) -> str:
        """The case's."""
        return self.pair.case.name


@dataclass(frozen=True, slots=True)
class Versions:
    """What is fused: the new version; the recipe's other LoRAs alone; the current one. None where there is none."""

    new: Plan
    others: Plan | None
    current: Plan | None


def task_of(name: str, cases: int, setup: Setup, *, current: bool) -> Task:
    """How much there is to render."""
    more = (setup.sampling, setup.sampling) if current else (setup.sampling,)
    return Task(name, cases, (*setup.sides, *more))


def render_sides(
    merged: Path,
    versions: Versions,
    cases: Sequence[Case],
    setup: Setup,
    watch: Watch,
) -> list[Sides]:
    """Render every case from every side.

    Args:
        merged: the new version's merged repository.
        versions: what is fused.
        cases: what to render.
        setup: how; its `baseline` says how the teacher is run, None leaves it out.
        watch: is told of what is rendered.

    Raises:
        RenderFailed: a side cannot be loaded or run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    watch.loads("merged")
    pipe = load_pipeline(merged, setup.pipeline, dtype=setup.dtype)
    ours = render_all(pipe, cases, setup.sampling, setup.placement, side="merged", watch=watch)
    shared = shared_components(pipe)
    drop_transformer(pipe)
    references = render_references(versions.new, cases, setup, shared, watch)
    beside = partial(_render_beside, versions.new.checkpoint.root, cases, setup, shared, watch)
    without = beside(versions.others, "without")
    before = [None] * len(cases) if versions.current is None else beside(versions.current, "current")
    pairs = pair_up(cases, ours, references)
    return [Sides(*side) for side in zip(pairs, without, before, strict=True)]


def _render_beside(
    base: Path,
    cases: Sequence[Case],
    setup: Setup,
    shared: Mapping[str, object],
    watch: Watch,
    plan: Plan | None,
    side: str,
) -> list[Rendered]:
    """The base with the recipe's scheduler, and LoRAs beside it if there are any."""
    watch.loads(side)
    pipe = load_pipeline(base, setup.pipeline, dtype=setup.dtype, shared=shared)
    if setup.scheduler:
        pipe.register_modules(scheduler=make_scheduler(setup.scheduler))
    if plan is not None:
        attach_beside(pipe, plan)
    pictures = render_all(pipe, cases, setup.sampling, setup.placement, side=side, watch=watch)
    drop_transformer(pipe)
    return pictures


@dataclass(frozen=True, slots=True)
class Measured:
    """The sides of a case, what the regression says of the merge, and what the judgement goes by."""

    sides: Sides
    result: CaseResult
    evidence: CaseEvidence


def measure(sides: Sequence[Sides], goldens: Mapping[str, Sequence[Golden]], rules: Rules) -> list[Measured]:
    """Compare every side that a judgement asks for.

    Args:
        sides: what was rendered.
        goldens: approved pictures by case, to show how far the new ones are; they decide nothing.
        rules: the recipe's, for merged against unfused.
    """
    judged = judge_pairs([side.pair for side in sides], goldens, rules)
    return [Measured(side, one.result, _evidence(side, one.result)) for side, one in zip(sides, judged, strict=True)]


def _evidence(side: Sides, result: CaseResult) -> CaseEvidence:
    new, plain, current, teacher = side.pair.merged, side.plain, side.current, side.teacher
    faults = tuple(result.reasons) if result.verdict == "invalid" else ()
    others = [one for one in (plain, current, teacher) if one is not None]
    levels = to_levels(new.image)
    before = [to_levels(one.image) for one in (plain, current) if one is not None]
    return CaseEvidence(
        name=side.name,
        faults=faults,
        apart=() if faults or result.agrees else tuple(result.reasons),
        moved=latents_l2(new.latents, plain.latents),
        changed=None if current is None else latents_l2(new.latents, current.latents),
        floor=max(latents_l2(side.pair.floor.latents, side.pair.unfused.latents), FLOAT32_NOISE),
        effect=None if current is None else effect(new.latents, current.latents, plain.latents),
        gain=None if teacher is None else gain(new.latents, plain.latents, teacher.latents),
        current_gain=None
        if teacher is None or current is None
        else gain(current.latents, plain.latents, teacher.latents),
        noise=noise_sigma(levels),
        noise_beside=max(noise_sigma(to_levels(one.image)) for one in others),
        comb_db=min(comb_db(levels, other) for other in before) if not faults else 0.0,
    )
