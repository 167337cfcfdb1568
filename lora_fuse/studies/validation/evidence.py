"""What a judgement goes by and what it comes to: measured values, bounds, questions with their answers. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from lora_fuse.recipe import Recipe

if TYPE_CHECKING:
    from lora_fuse.studies.validation.effect import Effect


class Outcome(StrEnum):
    """What is said of a new version."""

    SAME = "same"  # its pictures are the current ones
    CHANGED = "changed"  # other pictures, and nothing speaks against them: a person has to look
    BROKEN = "broken"


class Cause(StrEnum):
    """Why it is broken."""

    BASE = "wrong base"
    UNUSABLE = "unusable file"
    INVALID = "broken picture"
    MERGE = "wrong merge"
    NO_EFFECT = "no effect"
    SCALE = "wrong scale"
    NOISE = "noise"
    GRID = "grid"
    WORSE = "worse pictures"


OVER_FLOOR = 2.0  # where a recipe leaves it open: a right merge comes to at most 1.7 (docs/regression.md)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a new version is held to; `conf/config.yaml` has the values and what they separate.

    Attributes:
        alignment: cosine that its effect has to have with the current one's, at least, in the middle case.
        strength: how many times as strong as the current one it may be, and how many times weaker.
        gain_kept: the share of the current one's gain that it has to keep, on average.
        noise: how many times the noise of the noisiest other picture of a case it may have.
        comb_db: a grid's comb in the difference to the current picture and to the one without the LoRA, in dB.
        over_floor: how many times the noise floor latents may be apart and count as the same.
    """

    alignment: float
    strength: float
    gain_kept: float
    noise: float
    comb_db: float
    over_floor: float


@dataclass(frozen=True, slots=True)
class CaseEvidence:
    """What was measured of one case; None where there is nothing to compare with.

    Attributes:
        name: of the case.
        faults: why the picture cannot be compared: not finite, flat, of another size.
        apart: what separates merged and unfused, as the regression says it.
        moved: latents of merged to the run without the LoRA, relative L2.
        changed: latents of merged to the current version's, relative L2.
        floor: the noise floor of the latents.
        effect: see `lora_fuse.studies.validation.effect`.
        gain: the new version's.
        current_gain: the current one's.
        noise: of the new picture, in levels.
        noise_beside: the largest of the other pictures of the case.
        comb_db: of a grid, see `Bounds`.
    """

    name: str
    faults: tuple[str, ...]
    apart: tuple[str, ...]
    moved: float
    changed: float | None
    floor: float
    effect: Effect | None
    gain: float | None
    current_gain: float | None
    noise: float
    noise_beside: float
    comb_db: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One question and its answer: what was measured, what it is held to, and what breaks if it does not hold."""

    question: str
    measured: str
    limit: str
    holds: bool
    cause: Cause
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is said of a new version, why, and every question that was asked."""

    outcome: Outcome
    cause: Cause | None
    reason: str
    findings: tuple[Finding, ...]


def bounds_of(params: Recipe) -> Bounds:
    """What a new version of a LoRA is held to."""
    held, over_floor = params.validation, params.regress.over_floor or OVER_FLOOR
    return Bounds(held.alignment, held.strength, held.gain_kept, held.noise, held.comb_db, over_floor)
