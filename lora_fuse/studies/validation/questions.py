"""The questions that a new version is asked, in the order in which a broken one is named by them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from lora_fuse.studies.validation.evidence import Bounds, CaseEvidence, Cause, Finding

if TYPE_CHECKING:
    from lora_fuse.studies.validation.files import FileComparison

SAME_DIRECTION = 0.99  # cosine from which on two files hold the same differences, only stronger or weaker
SAME_STRENGTH = 1.05  # how much stronger or weaker those may be
WORKS = 0.2  # gain from which on a LoRA saves steps in a case; where the current one does not, nothing is to be lost


def sound(cases: Sequence[CaseEvidence]) -> list[Finding]:
    """Sound pictures, and a merge that does what the LoRA does."""
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


def acts(cases: Sequence[CaseEvidence], bounds: Bounds) -> Finding:
    """An effect at all."""
    times = max(in_floors(case.moved, case.floor) for case in cases)
    sentence = (
        "The LoRA has no effect: without it the pictures are the same"
        f"{f', at most {times:.2g} times the noise floor apart' if times else ''}. Are its factors zero, or the scale?"
    )
    return Finding(
        "Does it do anything?",
        "nothing at all" if times == 0 else f"{_round(times)} times the noise floor",
        f"> {bounds.over_floor:g}",
        times > bounds.over_floor,
        Cause.NO_EFFECT,
        sentence,
    )


def strong(cases: Sequence[CaseEvidence], files: FileComparison | None, bounds: Bounds, asked: float) -> list[Finding]:
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


def fits(cases: Sequence[CaseEvidence], warnings: Sequence[str], bounds: Bounds) -> list[Finding]:
    """A LoRA for this base, as far as is known and as far as its effect shows."""
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


def clean(cases: Sequence[CaseEvidence], bounds: Bounds) -> list[Finding]:
    """Neither noise nor a grid that was not there before."""
    noisy = max(cases, key=lambda case: in_floors(case.noise, max(case.noise_beside, 1e-9)))
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


def kept(cases: Sequence[CaseEvidence], bounds: Bounds) -> list[Finding]:
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


def _round(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def in_floors(value: float | None, floor: float) -> float:
    """How many times the floor; without a current version, infinitely many."""
    return math.inf if value is None else value / floor if floor else (0.0 if value == 0 else math.inf)
