"""Changed as expected, or broken, and by what: from measured values only. Pure.

A new LoRA should change pictures, so nothing here asks for the old ones. It asks what a broken one cannot give: a
merge that does what the LoRA does; an effect at all, of the current one's kind and size; for a LoRA that saves steps,
pictures as near to the base's own as before; no noise, no grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_fuse.validation.effect import Effect
    from lora_fuse.validation.files import FileComparison

SAME_DIRECTION = 0.99  # cosine from which on two files hold the same differences, only stronger or weaker
SAME_STRENGTH = 1.05  # how much stronger or weaker those may be
WORKS = 0.2  # gain from which on a LoRA saves steps in a case; where the current one does not, nothing is to be lost


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
        effect: see `lora_fuse.validation.effect`.
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


def refused(cause: Cause, sentence: str) -> Judgement:
    """A file that cannot be fused at all."""
    finding = Finding("Does the file fit the base?", "no", "", False, cause, sentence)
    return Judgement(Outcome.BROKEN, cause, sentence, (finding,))


def judge(
    cases: Sequence[CaseEvidence],
    files: FileComparison | None,
    warnings: Sequence[str],
    bounds: Bounds,
    asked: float = 1.0,
) -> Judgement:
    """Decide on a new version.

    Args:
        cases: what was measured, at least one.
        files: the two files; None without a current version.
        warnings: what is known of the pair of base and LoRA, see `lora_fuse.families.pair_warnings`.
        bounds: what it is held to.
        asked: how many times the current scale was asked for.
    """
    findings = [
        *_sound(cases),
        _acts(cases, bounds),
        *_strong(cases, files, bounds, asked),
        *_fits(cases, warnings, bounds),
        *_clean(cases, bounds),
        *_kept(cases, bounds),
    ]
    broken = next((finding for finding in findings if not finding.holds), None)
    if broken is not None:
        return Judgement(Outcome.BROKEN, broken.cause, broken.sentence, tuple(findings))
    times = max((_times(case.changed, case.floor) for case in cases), default=math.inf)
    if times <= bounds.over_floor:
        reason = f"The pictures are the current version's: within {times:.2g} times the noise floor of this run."
        return Judgement(Outcome.SAME, None, reason, tuple(findings))
    return Judgement(Outcome.CHANGED, None, _change(cases), tuple(findings))


def _change(cases: Sequence[CaseEvidence]) -> str:
    moved = [case for case in cases if case.changed is not None]
    if not moved:
        return "There is no current version to compare with, and nothing speaks against it: a person has to look."
    most = max(moved, key=lambda case: case.changed or 0.0)
    return (
        f"The pictures changed (latents by up to {most.changed:.2g} in {most.name}, the noise floor is "
        f"{most.floor:.2g}), and nothing speaks against them: a person has to look."
    )


def _round(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None, floor: float) -> float:
    """How many times the floor; without a current version, infinitely many."""
    return math.inf if value is None else value / floor if floor else (0.0 if value == 0 else math.inf)


def _sound(cases: Sequence[CaseEvidence]) -> list[Finding]:
    faults = [f"{case.name}: {fault}" for case in cases for fault in case.faults]
    apart = [f"{case.name}: {reason}" for case in cases for reason in case.apart]
    return [
        Finding(
            "Are the pictures sound?",
            f"{sum(not case.faults for case in cases)} of {len(cases)}",
            "all",
            not faults,
            Cause.INVALID,
            " ".join(faults[:1]),
        ),
        Finding(
            "Does the merge do what the LoRA does?",
            f"in {sum(not case.apart for case in cases)} of {len(cases)} cases",
            "all",
            not apart,
            Cause.MERGE,
            " ".join(apart[:1]),
        ),
    ]


def _acts(cases: Sequence[CaseEvidence], bounds: Bounds) -> Finding:
    times = max(_times(case.moved, case.floor) for case in cases)
    sentence = (
        "The LoRA has no effect: without it the pictures are the same, at most "
        f"{times:.2g} times the noise floor apart. Are its factors zero, or the scale?"
    )
    return Finding(
        "Does it do anything?",
        "nothing at all" if times == 0 else f"{_round(times)} times the noise floor",
        f"> {bounds.over_floor:g}",
        times > bounds.over_floor,
        Cause.NO_EFFECT,
        sentence,
    )


def _strong(cases: Sequence[CaseEvidence], files: FileComparison | None, bounds: Bounds, asked: float) -> list[Finding]:
    """As strong as the current version, in the file and in pictures.

    Files are held to it only where they hold the same differences: two trainings may differ in size and do the same. A
    scale that was asked for may make up for the file, or be meant.
    """
    findings = []
    alike = files is not None and files.ratio is not None and abs(files.cosine or 0) >= SAME_DIRECTION
    if files is not None and files.ratio is not None and files.cosine is not None and alike:
        ratio = math.copysign(files.ratio, files.cosine)
        sentence = (
            f"The file is wrong by a factor: it holds the current version's differences {ratio:.3g} times as large "
            f"(cosine {files.cosine:.3f}). Is alpha missing or ignored? It would be as strong at {1 / ratio:.3g} "
            "times the current scale."
        )
        holds = any(1 / SAME_STRENGTH <= one <= SAME_STRENGTH for one in (ratio, ratio * asked))
        limit = f"{1 / SAME_STRENGTH:.2f} to {SAME_STRENGTH:.2f} times"
        findings.append(
            Finding("Are the same differences as large?", f"{ratio:.3g} times", limit, holds, Cause.SCALE, sentence)
        )
    effects = [case.effect for case in cases if case.effect is not None]
    if effects and median(one.alignment for one in effects) >= bounds.alignment:
        strength = median(one.strength for one in effects)
        sentence = (
            f"It acts {strength:.2g} times as strongly on pictures as the current version, in the same direction: "
            "the scale is wrong."
        )
        holds = any(1 / bounds.strength <= one <= bounds.strength for one in (strength, strength / asked))
        limit = f"{1 / bounds.strength:.2f} to {bounds.strength:.2f} times"
        findings.append(
            Finding("Does it act as strongly?", f"{strength:.2f} times", limit, holds, Cause.SCALE, sentence)
        )
    return findings


def _fits(cases: Sequence[CaseEvidence], warnings: Sequence[str], bounds: Bounds) -> list[Finding]:
    findings = []
    if warnings:
        findings.append(Finding("Is it known to be for this base?", "no", "", False, Cause.BASE, warnings[0]))
    effects = [case.effect for case in cases if case.effect is not None]
    if effects:
        aligned, strength = (median(getattr(one, name) for one in effects) for name in ("alignment", "strength"))
        sentence = (
            f"It does not do on this base what the current version does: the cosine of the effects is {aligned:.2f}, "
            f"and {max(strength, 0.0):.0%} of the current effect is there. It was made for another base, or for "
            "something else."
        )
        findings.append(
            Finding(
                "Does it do the same kind of thing?",
                f"cosine {aligned:.2f}",
                f">= {bounds.alignment:g}",
                aligned >= bounds.alignment,
                Cause.BASE,
                sentence,
            )
        )
    return findings


def _clean(cases: Sequence[CaseEvidence], bounds: Bounds) -> list[Finding]:
    noisy = max(cases, key=lambda case: _times(case.noise, max(case.noise_beside, 1e-9)))
    noise = noisy.noise / max(noisy.noise_beside, 1e-9)
    combed = max(cases, key=lambda case: case.comb_db)
    return [
        Finding(
            "Are the pictures free of noise?",
            f"{noise:.2f} times the noisiest other picture ({noisy.name})",
            f"<= {bounds.noise:g}",
            noise <= bounds.noise,
            Cause.NOISE,
            f"{noisy.name} is noisy: {noisy.noise:.2g} levels, the noisiest other picture of the case has "
            f"{noisy.noise_beside:.2g}.",
        ),
        Finding(
            "Are they free of a grid?",
            f"comb {combed.comb_db:.1f} dB ({combed.name})",
            f"<= {bounds.comb_db:g} dB",
            combed.comb_db <= bounds.comb_db,
            Cause.GRID,
            f"{combed.name} has a grid: what changed stands out by {combed.comb_db:.1f} dB at one period.",
        ),
    ]


def _kept(cases: Sequence[CaseEvidence], bounds: Bounds) -> list[Finding]:
    """For a LoRA that saves steps; where the current version does not work, nothing is to be kept."""
    counted = [case for case in cases if case.gain is not None]
    pairs = [(case.gain, case.current_gain) for case in counted if case.current_gain is not None]
    working = [(new, old) for new, old in pairs if new is not None and old >= WORKS]
    if not counted or (pairs and not working):
        return []
    if not pairs:
        new, least = fmean(case.gain for case in counted if case.gain is not None), WORKS
        limit, beside = f">= {least:g}", ""
    else:
        new, old = fmean(one for one, _ in working), fmean(one for _, one in working)
        least, limit = bounds.gain_kept * old, f">= {bounds.gain_kept * old:.2f} (the current one's is {old:.2f})"
        beside = f", the current version's {old:.2f}"
    sentence = (
        f"It does not save steps: its pictures are {new:.2f} of the way from the base in few steps to the base in all "
        f"of its own{beside}."
    )
    return [Finding("Does it still save steps?", f"gain {new:.2f}", limit, new >= least, Cause.WORSE, sentence)]
