"""A judgement of a new version: the measured values, the answers to the questions, the outcome. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """The three outcomes of a judgement."""

    SAME = "same"  # its pictures are the current ones
    CHANGED = "changed"  # other pictures, and nothing speaks against them: a person has to look
    BROKEN = "broken"


class Cause(StrEnum):
    """The reasons for which a new version is broken."""

    BASE = "wrong base"
    OTHER = "another effect"
    UNUSABLE = "unusable file"
    INVALID = "broken picture"
    MERGE = "wrong merge"
    NO_EFFECT = "no effect"
    SCALE = "wrong scale"
    NOISE = "noise"
    GRID = "grid"
    WORSE = "worse pictures"


@dataclass(frozen=True, slots=True)
class Effect:
    """The new LoRA's effect beside the current one's."""

    alignment: float  # cosine of the angle between the two, 1 for the same direction, 0 for unrelated ones
    strength: float  # how much of the current one's effect the new one has, by projection: 1 for as much


@dataclass(frozen=True, slots=True)
class CaseEvidence:
    """Measurements of one case; None where there is nothing to compare with."""

    name: str  # of the case
    faults: tuple[str, ...]  # reasons why the picture cannot be compared: not finite, flat, of another size
    apart: tuple[str, ...]  # differences between merged and unfused, in the regression's words
    moved: float  # latents of merged to the run without the LoRA, relative L2
    changed: float | None  # latents of merged to the current version's, relative L2
    floor: float  # the noise floor of the latents
    effect: Effect | None
    gain: float | None  # the new version's
    current_gain: float | None  # the current one's
    noise: float  # of the new picture, in levels
    noise_beside: float  # the largest of the other pictures of the case
    comb_db: float  # of a grid, see `lora_fuse.recipe.sections.ValidationParams`


@dataclass(frozen=True, slots=True)
class Answer:
    """A question's answer: the measured value, its limit, and the cause to name if the limit does not hold."""

    question: str
    measured: str
    limit: str
    holds: bool
    cause: Cause
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome for a new version, the reason, and the answer to every question."""

    outcome: Outcome
    cause: Cause | None
    reason: str
    findings: tuple[Answer, ...]
