"""Verdicts on exports, as on the merge: is what a file gives back the merged model, within what its format costs?

An export is judged in this order:

1. by itself: every value finite, no picture broken. Else *invalid*.
2. its weights against what was meant (`weight_noise`) and its pictures against the merged ones of the run, by the
   limits of its format; what its readers' rules say of its header. Beyond any: *regression*.
3. *exact* where every weight and picture is the merged one, else *drift*.

Limits are of a format: what it costs is known, and what is wrong costs more. Pure: numbers in, sentences out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lora_fuse.errors import BadConfig
from lora_fuse.machine import FileRecord
from lora_fuse.pictures import metrics
from lora_fuse.recipe import Recipe
from lora_fuse.regression import verdicts
from lora_fuse.regression.exported.weight_noise import WeightNoise

ExportLimits: TypeAlias = Mapping[str, float]  # by the names of `lora_fuse.recipe.sections.ExportLimit`

# Numbers of a file that have a limit of the same name, by what they are called in a sentence.
OF_WEIGHTS: Mapping[str, str] = {
    "worst_l2": "relative L2 error of a matrix",
    "from_best": "distance from what the format makes of the exact sum, in times of its error,",
}


@dataclass(frozen=True, slots=True)
class WeightFigures:
    """Figures of all weights of an export; ``_in`` names the tensor that has the largest. None was not measured.

    Attributes:
        relative_l2: of all weights as one vector, to what was meant.
        worst_l2: the largest of any quantised matrix.
        from_best: the largest distance from what the format makes of the exact sum, see `TensorNoise.from_best`.
        noise: energy of the error over that of the LoRA's update, over all targets.
        cosine: of the realised and the meant update, over all targets.
        kept: the share of the LoRA that is left, over all targets.
        changed: tensors that the format keeps and that are not the merged ones.
        nonfinite: values that are NaN or infinite.
    """

    relative_l2: float | None = None
    worst_l2: float | None = None
    worst_l2_in: str | None = None
    from_best: float | None = None
    from_best_in: str | None = None
    noise: float | None = None
    cosine: float | None = None
    kept: float | None = None
    changed: int = 0
    changed_in: str | None = None
    nonfinite: int = 0

    @staticmethod
    def of(weights: WeightNoise) -> WeightFigures:
        """Sum up what was measured."""
        l2, best = (weights.worst(name) for name in ("relative_l2", "from_best"))
        changed = [tensor.name for tensor in weights.tensors if tensor.changed]
        return WeightFigures(
            relative_l2=weights.relative_l2,
            worst_l2=l2.relative_l2 if l2 else 0.0,
            worst_l2_in=l2.name if l2 else None,
            from_best=best.from_best if best else None,
            from_best_in=best.name if best else None,
            noise=weights.noise,
            cosine=weights.cosine,
            kept=weights.kept,
            changed=len(changed),
            changed_in=min(changed, default=None),
            nonfinite=weights.nonfinite,
        )


@dataclass(frozen=True, slots=True)
class ExportedCase:
    """An export's picture of a case: its facts, its distances to the merged one, and the case's noise floor.

    None where there is no picture, or nothing to compare it with.
    """

    facts: verdicts.Facts | None = None
    vs_merged: verdicts.Comparison | None = None
    floor: verdicts.Comparison | None = None

    @property
    def over_floor(self) -> float | None:
        """Distance of the latents to the merged ones, in noise floors; None where it was not measured."""
        return verdicts.over_floor(self.vs_merged, self.floor)


@dataclass(frozen=True, slots=True)
class Measures:
    """Everything that a verdict on an export follows from; `problems` are what its readers' rules say of the file."""

    weights: WeightFigures
    cases: Mapping[str, ExportedCase]
    problems: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class JudgedExport:
    """An export and what it came to; `file` is its path below the folder of exports, `reasons` are whole sentences."""

    format: str
    file: str
    record: FileRecord
    measures: Measures
    verdict: verdicts.Verdict
    reasons: tuple[str, ...]
    limits: ExportLimits
    seconds: Mapping[str, float] = field(default_factory=dict)


def limits_of(recipe: Recipe) -> dict[str, ExportLimits]:
    """The limits of every format that a recipe asks for.

    Raises:
        BadConfig: one has none; nothing would be judged by.
    """
    limits = recipe.regress.exports
    if missing := [name for name in recipe.export.formats if name not in limits]:
        raise BadConfig(
            f"export.formats asks for {missing[0]}, and regress.exports has limits for {', '.join(limits) or 'none'}: "
            "give it some (conf/regress/_exports.yaml), or take it out of export.formats"
        )
    return {name: {str(key): bound for key, bound in limits[name].items()} for name in recipe.export.formats}


def verdict_of(
    measures: Measures, limits: ExportLimits, over_floor: float | None
) -> tuple[verdicts.Verdict, tuple[str, ...]]:
    """Decide on an export; `over_floor` are the times of the noise floor that a picture's limits at least allow."""
    broken = list(_broken(measures))
    if broken:
        return verdicts.Verdict.INVALID, tuple(broken)
    wrong = [*measures.problems, *_wrong_weights(measures.weights, limits)]
    for name, case in measures.cases.items():
        wrong += _wrong_picture(name, case, limits, over_floor)
    if wrong:
        return verdicts.Verdict.REGRESSION, tuple(wrong)
    same = measures.weights.relative_l2 == 0 and all(
        case.vs_merged is not None and case.vs_merged.identical for case in measures.cases.values()
    )
    return (verdicts.Verdict.EXACT if same else verdicts.Verdict.DRIFT), ()


def _broken(measures: Measures) -> Iterator[str]:
    if measures.weights.nonfinite:
        yield f"{measures.weights.nonfinite} weights are NaN or infinite."
    for name, case in measures.cases.items():
        if case.facts is not None and case.facts.nonfinite:
            yield f"The picture {name} has {case.facts.nonfinite} values that are NaN or infinite."
        if case.facts is not None and case.facts.flat:
            yield f"The picture {name} is flat: it has a single colour."


def _wrong_weights(weights: WeightFigures, limits: ExportLimits) -> Iterator[str]:
    if weights.relative_l2 is None:
        yield "The weights were not measured."
        return
    if weights.changed:
        yield f"{weights.changed} tensors that the format keeps are not the merged ones, {weights.changed_in} for one."
    for name, words in OF_WEIGHTS.items():
        bound = limits.get(name)
        value = getattr(weights, name)
        if bound is not None and not (value is not None and value <= bound):
            where = getattr(weights, f"{name}_in")
            yield f"The {words} is {_text(value)}{f' in {where}' if where else ''}, above {bound:g}."
    bound = limits.get("kept")
    if bound is not None and weights.noise is not None and not _within(weights.kept, bound):
        yield f"{_text(weights.kept)} of the LoRA is left in the weights, and 1 within {bound:g} is meant."


def _within(kept: float | None, bound: float) -> bool:
    return kept is not None and abs(kept - 1) <= bound


def _wrong_picture(name: str, case: ExportedCase, limits: ExportLimits, times: float | None) -> Iterator[str]:
    if case.vs_merged is None:
        yield f"There is no picture {name} that could be compared with the merged one."
        return
    floor = None if case.floor is None else case.floor.values
    held = verdicts.Limits({name: bound for name, bound in limits.items() if name in metrics.METRICS}).over(
        times, floor
    )
    for sentence in verdicts.beyond(case.vs_merged, held, "the merged picture"):
        yield f"{name}: {sentence}"
    if (bound := limits.get("over_floor")) is not None:
        over = case.over_floor
        if over is None:
            yield f"{name}: The noise floor was not measured."
        elif not over <= bound:
            apart = f"{over:.3g} times the noise floor from the merged ones"
            yield f"{name}: The latents are {apart}, above {bound:g}."


def _text(value: float | None) -> str:
    return "not a number" if value is None or math.isnan(value) else f"{value:.4g}"


def failed(judged: Iterable[JudgedExport]) -> list[JudgedExport]:
    """The exports that do not pass."""
    return [export for export in judged if not export.verdict.passed]
