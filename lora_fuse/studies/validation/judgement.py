"""Changed as expected, or broken, and by what: from measured values only. Pure.

A new LoRA should change pictures, so nothing here asks for the old ones. It asks what a broken one cannot give: a
merge that does what the LoRA does; an effect at all, of the current one's kind and size; for a LoRA that saves steps,
pictures as near to the base's own as before; no noise, no grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_fuse.recipe import Recipe
from lora_fuse.studies.validation.outcome import Answer, CaseEvidence, Cause, Judgement, Outcome
from lora_fuse.studies.validation.questions import acts, clean, fits, in_floors, kept, sound, strong

if TYPE_CHECKING:
    from lora_fuse.studies.validation.file_comparison import FileComparison


OVER_FLOOR = 2.0  # where a recipe leaves it open: a right merge comes to at most 1.7 (docs/regression.md)


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
