"""Verdicts: is the merged checkpoint's picture right? Pure; pictures come in as arrays, thresholds as `Rules`.

A case is judged in this order, and the first failure names the verdict:

1. by itself: finite, not flat, of the size asked for. A picture that fails cannot be compared: *invalid*.
2. within the run, against base + LoRA unfused, and its noise floor. This pair shares hardware and libraries, so it
   holds a tight limit everywhere. Beyond it, or at other sigmas than the recipe's: *regression*.
3. against the golden, a picture approved in this very environment. Beyond its limit: *regression*; else *exact* or
   *drift*.

A golden of a near environment can say *review* at best. A case without any is *no-golden*, which is never a pass:
approving is a person's act.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

from lora_fuse.pictures import metrics, picture

Size: TypeAlias = tuple[int, int]  # width, height in pixels
Values: TypeAlias = Mapping[str, float]  # by metric, as `metrics.METRICS` names them
Scalar: TypeAlias = float | int | bool | str | None

# What arithmetic in float32 leaves in the latents (relative L2), below which no floor is compared with.
FLOAT32_NOISE = 1e-5
SIGMA_TOLERANCE = 1e-4


class Verdict(StrEnum):
    """What is said of a case, from best to worst.

    A regression ranks above a missing golden: approving new goldens must not be the way out of a regression.
    """

    EXACT = "exact"  # the golden, bit for bit
    DRIFT = "drift"  # not the golden, and within its limits
    REVIEW = "review"  # within the limits of a golden of another environment: a person has to look
    NO_GOLDEN = "no-golden"
    REGRESSION = "regression"
    INVALID = "invalid"

    @property
    def severity(self) -> int:
        """0 for the best."""
        return list(Verdict).index(self)

    @property
    def passed(self) -> bool:
        """Whether it lets a build through."""
        return self in {Verdict.EXACT, Verdict.DRIFT}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of a whole run; without any case, invalid: nothing was looked at."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.INVALID)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far two pictures may be apart: a bound for each metric that decides, by its name in `metrics.METRICS`.

    The values and what they separate are in `conf/regress/`. No metric sees everything: PSNR sees a change of the whole
    picture and misses a small patch, the worst block sees the patch, only the comb sees a faint grid.
    """

    bounds: Mapping[str, float]

    def over(self, floor: Values | None, times: float | None) -> Limits:
        """The limits that can be held where rounding alone does `floor`: no bound is tighter than `times` that.

        Some pictures are chaotic in 16 bits: one flipped rounding moves whole regions, whoever renders them.
        """
        if floor is None or times is None:
            return self
        loosened = {
            name: metrics.METRICS[name].loosened(bound, floor[name], times)
            if math.isfinite(floor.get(name, math.nan))
            else bound
            for name, bound in self.bounds.items()
        }
        return Limits(loosened)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a case is held to.

    Attributes:
        unfused: limits of merged against unfused.
        golden: limits of merged against golden.
        over_floor: how many times the noise floor the latents of that first pair may be apart, and the limits at
            least allow; None decides and changes nothing. A golden's floor is that of the run it is from.
        sigmas: what the pipeline must visit, without the final 0; None leaves it open.
    """

    unfused: Limits
    golden: Limits
    over_floor: float | None = None
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Golden(picture.Picture):
    """An approved picture, its file's name, and the noise floor of its run.

    `elsewhere` says of which environment it is where that is not the run's.
    """

    name: str
    elsewhere: str | None = None
    floor: Values | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The distances between two pictures, by metric. The PSNR of identical ones is infinite."""

    values: Values

    @property
    def identical(self) -> bool:
        """Whether every level is the same."""
        return math.isinf(self.values["psnr_db"])


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of a picture by itself; `nonfinite` counts the values that were NaN or infinite before rounding."""

    size: Size
    nonfinite: int
    flat: bool

    @staticmethod
    def of(picture: picture.Picture) -> Facts:
        """Look at a picture alone."""
        return Facts(picture.size, picture.nonfinite, metrics.is_flat(picture.levels))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a case asked for; `size` is None where the choice was left to the pipeline."""

    name: str
    prompt: str
    seed: int
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A judged case. `reasons` are whole sentences with both values; a comparison that was not possible is None.

    `floor` compares the unfused pipeline with itself, moved by as much as rounding moves it; `agrees` says that merged
    and unfused are the same within their limits; `golden` is the one that the picture is nearest to. The limits are
    those that counted.
    """

    subject: Subject
    facts: Facts
    vs_unfused: Comparison | None
    floor: Comparison | None
    vs_golden: Comparison | None
    golden: Golden | None
    agrees: bool
    verdict: Verdict
    reasons: tuple[str, ...]
    unfused_limits: Limits
    golden_limits: Limits

    @property
    def over_floor(self) -> float | None:
        """How many times the noise floor the latents of merged and unfused are apart."""
        if self.vs_unfused is None or self.floor is None or "latents_l2" not in self.floor.values:
            return None
        apart = self.vs_unfused.values.get("latents_l2", math.nan)
        return apart / max(self.floor.values["latents_l2"], FLOAT32_NOISE)


def compare(a: picture.Picture, b: picture.Picture) -> Comparison:
    """Measure two pictures against each other, and their latents where both have them.

    Raises:
        ValueError: they differ in size.
    """
    same = a.levels.shape == b.levels.shape and bool((a.levels == b.levels).all())
    values = {
        name: metric.best if same else metric.measure(a.levels, b.levels)
        for name, metric in metrics.METRICS.items()
        if not metric.of_latents
    }
    if a.latents is not None and b.latents is not None:
        values |= {name: m.measure(a.latents, b.latents) for name, m in metrics.METRICS.items() if m.of_latents}
    return Comparison(values)


def examine(
    subject: Subject,
    merged: picture.Picture,
    unfused: picture.Picture,
    goldens: Sequence[Golden],
    rules: Rules,
    floor: picture.Picture | None = None,
) -> CaseResult:
    """Measure and judge the pictures of one case.

    Args:
        subject: what was asked for.
        merged: from the merged checkpoint.
        unfused: from base + LoRA.
        goldens: approved pictures, all of one environment.
        rules: what they are held to.
        floor: the unfused pipeline again, moved by as much as rounding moves it.
    """
    found = _nearest_golden(merged, goldens)
    golden, vs_golden = found or (None, None)
    vs_unfused = _compare_if_possible(merged, unfused)
    of_floor = None if floor is None else _compare_if_possible(floor, unfused)
    result = CaseResult(
        subject,
        Facts.of(merged),
        vs_unfused,
        of_floor,
        vs_golden,
        golden,
        agrees=False,
        verdict=Verdict.INVALID,
        reasons=(),
        unfused_limits=rules.unfused.over(None if of_floor is None else of_floor.values, rules.over_floor),
        golden_limits=rules.golden.over(None if golden is None else golden.floor, rules.over_floor),
    )
    facts = {"merged": result.facts, "unfused": Facts.of(unfused)}
    faults = [*_faults(facts), *_wrong_sizes(facts, subject.size)]
    if faults:
        return _decided(result, Verdict.INVALID, faults)
    apart = [*_wrong_sigmas(merged, unfused, rules.sigmas), *_disagreement(result, rules)]
    return _decided(result, *_against_golden(result, apart), agrees=not apart)


def _decided(result: CaseResult, verdict: Verdict, reasons: Iterable[str], *, agrees: bool = False) -> CaseResult:
    return replace(result, agrees=agrees, verdict=verdict, reasons=tuple(reasons))


def _nearest_golden(merged: picture.Picture, goldens: Sequence[Golden]) -> tuple[Golden, Comparison | None] | None:
    """The golden that has the least error to the picture; one of another size only if there is no other."""
    compared = [(golden, _compare_if_possible(merged, golden)) for golden in goldens]
    return max(compared, key=lambda pair: -1.0 if pair[1] is None else pair[1].values["psnr_db"], default=None)


def _disagreement(result: CaseResult, rules: Rules) -> list[str]:
    """What separates merged and unfused."""
    if result.vs_unfused is None:
        return ["The merged picture was not compared with the unfused one."]
    sentences = beyond(result.vs_unfused, result.unfused_limits, "the unfused picture of this run")
    if rules.over_floor is not None:
        over = result.over_floor
        if over is None:
            sentences.append("The noise floor was not measured, and the recipe sets regress.over_floor.")
        elif not over <= rules.over_floor:
            sentences.append(
                f"The latents are {over:.3g} times the noise floor from those of the unfused run, "
                f"above {rules.over_floor:g} times: the merge does not do what the LoRA does."
            )
    return sentences


def _against_golden(result: CaseResult, apart: Sequence[str]) -> tuple[Verdict, list[str]]:
    """The verdict of a case whose pictures are sound; `apart` is what separates merged and unfused."""
    golden, compared = result.golden, result.vs_golden
    here = golden is not None and golden.elsewhere is None
    broken = [] if golden is None else _beyond_golden(result, golden, compared)
    if apart or (here and broken):
        return Verdict.REGRESSION, [*apart, *(broken if here else ())]
    if golden is None:
        return Verdict.NO_GOLDEN, ["No picture was approved for this case."]
    if here and compared is not None and compared.identical:
        return Verdict.EXACT, []
    if here:
        return Verdict.DRIFT, [f"Not the golden bit for bit, and within its limits: {_measured(compared)}."]
    where = f"the golden of {golden.elsewhere}, the nearest environment that has one"
    if broken:
        return Verdict.NO_GOLDEN, [f"No picture was approved here, and {where}, is too far.", *broken]
    return Verdict.REVIEW, [f"No picture was approved here. Within the limits of {where}: {_measured(compared)}."]


def _beyond_golden(result: CaseResult, golden: Golden, compared: Comparison | None) -> list[str]:
    if compared is not None:
        return beyond(compared, result.golden_limits, "the golden")
    (width, height), picture = golden.size, result.facts.size
    return [f"The golden {golden.name} is {width}x{height}, and the merged picture {picture[0]}x{picture[1]}."]


def flat_metrics(results: Iterable[CaseResult]) -> dict[str, Scalar]:
    """The judged cases as `metrics.json` has them: `passed`, `verdict`, and one level of dotted keys per case.

    ``{case}.verdict``, ``{case}.reasons`` and, for the pairs ``golden``, ``unfused`` and ``floor``,
    ``{case}.golden.psnr_db`` and so on. Every case has every key (null where nothing was measured, or where the PSNR
    is infinite), so that a difference between two runs shows.
    """
    listed = list(results)
    overall = worst(result.verdict for result in listed)
    flat: dict[str, Scalar] = {"passed": overall.passed, "verdict": overall.value}
    for result in listed:
        name = result.subject.name
        flat[f"{name}.verdict"] = result.verdict.value
        flat[f"{name}.reasons"] = " ".join(result.reasons)
        flat[f"{name}.agrees"] = result.agrees
        flat[f"{name}.over_floor"] = _json_number(result.over_floor)
        for pair, comparison in (("golden", result.vs_golden), ("unfused", result.vs_unfused), ("floor", result.floor)):
            for metric in metrics.METRICS:
                value = None if comparison is None else comparison.values.get(metric)
                flat[f"{name}.{pair}.{metric}"] = _json_number(value)
            flat[f"{name}.{pair}.identical"] = comparison is not None and comparison.identical
    return flat


def _json_number(value: float | None) -> float | None:
    """JSON has neither infinity nor NaN."""
    return value if value is not None and math.isfinite(value) else None


def _faults(facts: Mapping[str, Facts]) -> list[str]:
    faults = []
    for name, fact in facts.items():
        if fact.nonfinite:
            total = fact.size[0] * fact.size[1] * 3
            faults.append(f"The {name} picture has {fact.nonfinite} of {total} values that are NaN or infinite.")
        if fact.flat:
            faults.append(f"The {name} picture is flat: it has a single colour.")
    return faults


def _wrong_sizes(facts: Mapping[str, Facts], asked: Size | None) -> list[str]:
    width, height = facts["merged"].size
    expected = {} if asked is None else {"asked for": asked}
    expected |= {f"that of the {name} picture": fact.size for name, fact in facts.items() if name != "merged"}
    return [
        f"The merged picture is {width}x{height}, and the size {whose} is {size[0]}x{size[1]}."
        for whose, size in expected.items()
        if size != (width, height)
    ]


def _wrong_sigmas(merged: picture.Picture, unfused: picture.Picture, wanted: tuple[float, ...] | None) -> list[str]:
    if wanted is None:
        return []
    return [
        f"The {name} pipeline visited the sigmas {_listed(picture.sigmas[:-1])}, the recipe's are {_listed(wanted)}."
        for name, picture in (("merged", merged), ("unfused", unfused))
        if len(picture.sigmas) != len(wanted) + 1
        or not all(abs(a - b) <= SIGMA_TOLERANCE for a, b in zip(picture.sigmas, wanted, strict=False))
    ]


def _listed(sigmas: Iterable[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)


def _compare_if_possible(a: picture.Picture, b: picture.Picture) -> Comparison | None:
    return compare(a, b) if a.levels.shape == b.levels.shape else None


def beyond(comparison: Comparison, limits: Limits, other: str) -> list[str]:
    """A sentence for each limit that does not hold; a NaN holds none."""
    sentences = []
    for name, bound in limits.bounds.items():
        metric, value = metrics.METRICS[name], comparison.values[name]
        if not metric.holds(value, bound):
            side = "below" if metric.higher_is_nearer else "above"
            title = metric.title[0].upper() + metric.title[1:]
            sentences.append(f"{title} to {other} is {metric.text(value)}, {side} {metric.bound_text(bound)}.")
    return sentences


def _measured(comparison: Comparison | None) -> str:
    if comparison is None:
        return "not measured"
    shown = ("psnr_db", "max_abs", "flip_worst")
    return ", ".join(
        f"{metrics.METRICS[name].title} {metrics.METRICS[name].text(comparison.values[name])}" for name in shown
    )
