"""Renders the pictures that a new version of a LoRA is judged by, in one process, and measures them.

Six sides of every case: the new version merged, and unfused with its noise floor; the current version; neither; and for
a LoRA that saves steps the base alone at its own settings, its teacher.

Same seed and few steps: the latents of two runs lie in one space, and what a LoRA does to them is a vector there, the
difference to the same run without it. Two versions of a LoRA that are meant for the same thing point the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_fuse.fusion import Plan
from lora_fuse.pictures import Case, damage, metrics, pairs, picture, render_progress
from lora_fuse.regression import case_judgement, verdicts
from lora_fuse.studies.validation.outcome import CaseEvidence, Effect


@dataclass(frozen=True, slots=True)
class Sides:
    """The pictures of one case, as they were rendered; `teacher` and `current` may be missing."""

    pair: pairs.Pair
    plain: picture.Rendered
    current: picture.Rendered | None

    @property
    def teacher(self) -> picture.Rendered | None:
        """The base alone at its own steps."""
        return self.pair.baseline

    @property
    def name(self) -> str:
        """The case's."""
        return self.pair.case.name


@dataclass(frozen=True, slots=True)
class Versions:
    """Plans of the new version, of the recipe's other LoRAs alone, and of the current one; None where there is none."""

    new: Plan
    others: Plan | None
    current: Plan | None


def render_sides(
    merged: Path,
    versions: Versions,
    cases: Sequence[Case],
    setup: pairs.Setup,
    watch: render_progress.RenderProgress,
) -> list[Sides]:
    """Render every case from every side; `setup.baseline` are the teacher's settings, None leaves it out.

    Raises:
        RenderFailed: a side cannot be loaded or run.
        OutOfMemory: the GPU's memory is short; the message names the placement to try.
    """
    ours_share, base_share = pairs.share_both(merged, versions.new, cases, setup, watch)
    ours = pairs.render_merged(merged, cases, setup, ours_share, watch)
    base = pairs.BaseSides(versions.new.checkpoint.root, cases, setup, base_share, watch)
    without = base.beside(versions.others, "without")
    before = [None] * len(cases) if versions.current is None else base.beside(versions.current, "current")
    rendered = pairs.pair_up(cases, ours, base.references(versions.new))
    return [Sides(*side) for side in zip(rendered, without, before, strict=True)]


@dataclass(frozen=True, slots=True)
class MeasuredCase:
    """The sides of a case, the regression's result for the merge, and the evidence for the judgement."""

    sides: Sides
    result: verdicts.CaseResult
    evidence: CaseEvidence


def measure(
    sides: Sequence[Sides], goldens: Mapping[str, Sequence[verdicts.Golden]], rules: verdicts.Rules
) -> list[MeasuredCase]:
    """Compare every side that a judgement asks for; goldens show how far the new ones are and decide nothing."""
    judged = case_judgement.judge_pairs([side.pair for side in sides], goldens, rules)
    results = [pair.result for pair in judged]
    return [MeasuredCase(side, result, _evidence(side, result)) for side, result in zip(sides, results, strict=True)]


def _evidence(side: Sides, result: verdicts.CaseResult) -> CaseEvidence:
    new = side.pair.merged
    plain = side.plain
    current = side.current
    teacher = side.teacher
    faults = tuple(result.reasons) if result.verdict == "invalid" else ()
    before = [plain.levels] if current is None else [plain.levels, current.levels]
    others = before if teacher is None else [*before, teacher.levels]
    return CaseEvidence(
        name=side.name,
        faults=faults,
        apart=() if faults or result.agrees else tuple(result.reasons),
        moved=metrics.latents_l2(new.latents, plain.latents),
        changed=None if current is None else metrics.latents_l2(new.latents, current.latents),
        floor=max(metrics.latents_l2(side.pair.floor.latents, side.pair.unfused.latents), verdicts.FLOAT32_NOISE),
        effect=None if current is None else effect(new.latents, current.latents, plain.latents),
        gain=None if teacher is None else gain(new.latents, plain.latents, teacher.latents),
        current_gain=gain(current.latents, plain.latents, teacher.latents) if current and teacher else None,
        noise=damage.noise_levels(new.levels),
        noise_beside=max(damage.noise_levels(levels) for levels in others),
        comb_db=min(damage.comb_db(new.levels, other) for other in before) if not faults else 0.0,
    )


def effect(new: picture.Latents, current: picture.Latents, plain: picture.Latents) -> Effect | None:
    """Compare what two LoRAs do to the same run without either; None if the current one does nothing.

    With ``n = new - plain`` and ``c = current - plain``: ``n.c / (|n| |c|)`` and ``n.c / |c|^2``.

    Raises:
        ValueError: they differ in shape.
    """
    if not new.shape == current.shape == plain.shape:
        raise ValueError(f"latents of different shapes: {new.shape}, {current.shape} and {plain.shape}")
    n, c = ((side.astype(np.float64) - plain).ravel() for side in (new, current))
    size = float(np.linalg.norm(c))
    if size == 0:
        return None
    product = float(n @ c)
    own = float(np.linalg.norm(n))
    return Effect(product / (own * size) if own else 0.0, product / size**2)


def gain(picture: picture.Latents, plain: picture.Latents, teacher: picture.Latents) -> float:
    """The share that is gone of the way from the base in few steps to the base in all of its steps: 1 is all of it.

    ``1 - |picture - teacher| / |plain - teacher|``; below 0 the LoRA leads away. For LoRAs that save steps.

    Raises:
        ValueError: latents differ in shape.
    """
    way = metrics.latents_l2(plain, teacher)
    return 1 - metrics.latents_l2(picture, teacher) / way if way else math.nan
