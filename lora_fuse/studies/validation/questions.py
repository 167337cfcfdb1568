"""The questions that a new version is asked, in the order in which a broken one is named by them, and its judgement.

A new LoRA should change pictures, so nothing here asks for the old ones. It asks what a broken one cannot give: a
merge that does what the LoRA does; an effect at all, of the current one's kind and size; for a LoRA that saves steps,
pictures as near to the base's own as before; no noise, no grid. Pure: from measured values only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from lora_fuse.recipe import Recipe, sections
from lora_fuse.studies.validation.file_comparison import SAME_DIRECTION, FileComparison
from lora_fuse.studies.validation.outcome import Answer, CaseEvidence, Cause, Judgement, Outcome

OVER_FLOOR = 2.0  # where a recipe leaves it open: a right merge comes to at most 1.7 (docs/regression.md)
SAME_STRENGTH = 1.05  # how much stronger or weaker those may be
UNRELATED = 0.2  # cosine below which an effect has nothing to do with the current one: random ones have 0
WORKS = 0.2  # gain from which on a LoRA saves steps in a case; where the current one does not, nothing is to be lost


def refused(cause: Cause, sentence: str) -> Judgement:
    """The judgement of a file that cannot be fused at all."""
    answer = Answer("Does the file fit the base?", "no", "", False, cause, sentence)
    return Judgement(Outcome.BROKEN, cause, sentence, (answer,))


def judge(
    cases: Sequence[CaseEvidence],
    files: FileComparison | None,
    warnings: Sequence[str],
    recipe: Recipe,
    asked: float = 1.0,
) -> Judgement:
    """Decide on a new version.

    Without a current version there are no `files`; `warnings` are facts against the pair of base and LoRA; `asked` is
    the scale that was asked for, over the current one.
    """
    bounds = recipe.validation
    over_floor = recipe.regress.over_floor or OVER_FLOOR
    answers = (
        *sound(cases),
        acts(cases, over_floor),
        *strong(cases, files, bounds, asked),
        *fits(cases, warnings, bounds),
        *clean(cases, bounds),
        *kept(cases, bounds),
    )
    broken = next((answer for answer in answers if not answer.holds), None)
    if broken is not None:
        return Judgement(Outcome.BROKEN, broken.cause, broken.sentence, answers)
    times = max((in_floors(case.changed, case.floor) for case in cases), default=math.inf)
    if times <= over_floor:
        reason = f"The pictures are the current version's: within {times:.2g} times the noise floor of this run."
        return Judgement(Outcome.SAME, None, reason, answers)
    return Judgement(Outcome.CHANGED, None, _change(cases), answers)


def _change(cases: Sequence[CaseEvidence]) -> str:
    moved = [case for case in cases if case.changed is not None]
    if not moved:
        return "There is no current version to compare with, and nothing speaks against it: a person has to look."
    most = max(moved, key=lambda case: case.changed or 0.0)
    return (
        f"The pictures changed (latents by up to {most.changed:.2g} in {most.name}, the noise floor is "
        f"{most.floor:.2g}), and nothing speaks against them: a person has to look."
    )


def sound(cases: Sequence[CaseEvidence]) -> list[Answer]:
    """Ask for sound pictures, and a merge that does what the LoRA does."""
    faults = [f"{case.name}: {fault}" for case in cases for fault in case.faults]
    apart = [f"{case.name}: {reason}" for case in cases for reason in case.apart]
    unharmed = f"{sum(not case.faults for case in cases)} of {len(cases)}"
    agreeing = f"in {sum(not case.apart for case in cases)} of {len(cases)} cases"
    return [
        Answer("Are the pictures sound?", unharmed, "all", not faults, Cause.INVALID, " ".join(faults[:1])),
        Answer("Does the merge do what the LoRA does?", agreeing, "all", not apart, Cause.MERGE, " ".join(apart[:1])),
    ]


def acts(cases: Sequence[CaseEvidence], over_floor: float) -> Answer:
    """Ask for an effect at all: larger than `over_floor` times the noise floor."""
    times = max(in_floors(case.moved, case.floor) for case in cases)
    sentence = (
        "The LoRA has no effect: without it the pictures are the same"
        f"{f', at most {times:.2g} times the noise floor apart' if times else ''}. Are its factors zero, or the scale?"
    )
    measured = "nothing at all" if times == 0 else f"{_round(times)} times the noise floor"
    holds = times > over_floor
    return Answer("Does it do anything?", measured, f"> {over_floor:g}", holds, Cause.NO_EFFECT, sentence)


def strong(
    cases: Sequence[CaseEvidence], files: FileComparison | None, bounds: sections.ValidationParams, asked: float
) -> list[Answer]:
    """Ask for the strength of the current version, in the file and in pictures.

    Files are compared only where they hold the same differences: two trainings may differ in size and do the same. A
    scale that was asked for may make up for the file, or be meant.
    """
    answers = []
    if files and files.ratio is not None and files.cosine is not None and abs(files.cosine) >= SAME_DIRECTION:
        ratio = math.copysign(files.ratio, files.cosine)
        sentence = (
            f"The file is wrong by a factor: it holds the current version's differences {ratio:.3g} times as large "
            f"(cosine {files.cosine:.3f}). Is alpha missing or ignored? It would be as strong at {1 / ratio:.3g} "
            "times the current scale."
        )
        question = "Are the same differences as large?"
        answers.append(_as_strong(question, (ratio, ratio * asked), SAME_STRENGTH, f"{ratio:.3g}", sentence))
    effects = [case.effect for case in cases if case.effect is not None]
    if effects and median(effect.alignment for effect in effects) >= bounds.alignment:
        strength = median(effect.strength for effect in effects)
        sentence = (
            f"It acts {strength:.2g} times as strongly on pictures as the current version, in the same direction: "
            "the scale is wrong."
        )
        ratios = (strength, strength / asked)
        answers.append(_as_strong("Does it act as strongly?", ratios, bounds.strength, f"{strength:.2f}", sentence))
    return answers


def _as_strong(question: str, ratios: tuple[float, float], times: float, measured: str, sentence: str) -> Answer:
    """The answer to a question about strength: one of the ratios has to be at most `times` from 1."""
    holds = any(1 / times <= ratio <= times for ratio in ratios)
    limit = f"{1 / times:.2f} to {times:.2f} times"
    return Answer(question, f"{measured} times", limit, holds, Cause.SCALE, sentence)


def fits(cases: Sequence[CaseEvidence], warnings: Sequence[str], bounds: sections.ValidationParams) -> list[Answer]:
    """Ask for a LoRA of this base, as far as is known and as far as its effect shows."""
    answers = []
    if warnings:
        answers.append(Answer("Is it known to be for this base?", "no", "", False, Cause.BASE, warnings[0]))
    effects = [case.effect for case in cases if case.effect is not None]
    if effects:
        aligned = median(effect.alignment for effect in effects)
        strength = median(effect.strength for effect in effects)
        cause = Cause.BASE if aligned < UNRELATED else Cause.OTHER
        likely = (
            "It was made for another base, as it seems."
            if cause is Cause.BASE
            else "It is for something else, as it seems: give it a recipe of its own."
        )
        sentence = (
            f"It does not do on this base what the current version does: the cosine of the effects is {aligned:.2f}, "
            f"and {max(strength, 0.0):.0%} of the current effect is there. {likely}"
        )
        question = "Does it do the same kind of thing?"
        limit = f">= {bounds.alignment:g}"
        holds = aligned >= bounds.alignment
        answers.append(Answer(question, f"cosine {aligned:.2f}", limit, holds, cause, sentence))
    return answers


def clean(cases: Sequence[CaseEvidence], bounds: sections.ValidationParams) -> list[Answer]:
    """Ask for neither noise nor a grid that was not there before."""
    noisy = max(cases, key=lambda case: in_floors(case.noise, max(case.noise_beside, 1e-9)))
    noise = noisy.noise / max(noisy.noise_beside, 1e-9)
    combed = max(cases, key=lambda case: case.comb_db)
    return [
        Answer(
            "Are the pictures free of noise?",
            f"{noise:.2f} times the noisiest other picture ({noisy.name})",
            f"<= {bounds.noise:g}",
            noise <= bounds.noise,
            Cause.NOISE,
            f"{noisy.name} is noisy: {noisy.noise:.2g} levels, the noisiest other picture of the case has "
            f"{noisy.noise_beside:.2g}.",
        ),
        Answer(
            "Are they free of a grid?",
            f"comb {combed.comb_db:.1f} dB ({combed.name})",
            f"<= {bounds.comb_db:g} dB",
            combed.comb_db <= bounds.comb_db,
            Cause.GRID,
            f"{combed.name} has a grid: what changed stands out by {combed.comb_db:.1f} dB at one period.",
        ),
    ]


def kept(cases: Sequence[CaseEvidence], bounds: sections.ValidationParams) -> list[Answer]:
    """Ask a LoRA that saves steps for its gain; where the current version has none, nothing is to be kept."""
    gains = [case.gain for case in cases if case.gain is not None]
    both = [(case.gain, case.current_gain) for case in cases if case.gain is not None and case.current_gain is not None]
    working = [(new, old) for new, old in both if old >= WORKS]
    if not gains or (both and not working):
        return []
    new = fmean(gain for gain, _ in working) if working else fmean(gains)
    least = WORKS
    limit = f">= {least:g}"
    beside = ""
    if working:
        old = fmean(gain for _, gain in working)
        least = bounds.gain_kept * old
        limit = f">= {least:.2f} (the current one's is {old:.2f})"
        beside = f", the current version's {old:.2f}"
    sentence = (
        f"It does not save steps: its pictures are {new:.2f} of the way from the base in few steps to the base in all "
        f"of its own{beside}."
    )
    return [Answer("Does it still save steps?", f"gain {new:.2f}", limit, new >= least, Cause.WORSE, sentence)]


def _round(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def in_floors(value: float | None, floor: float) -> float:
    """A value over the noise floor; without a current version, infinite."""
    if value is None or (floor == 0 and value != 0):
        return math.inf
    return value / floor if floor else 0.0
