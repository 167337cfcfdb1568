"""Verdicts: is the merged checkpoint's picture right? Pure; pictures come in as arrays, thresholds as `Limits`.

A case is judged in this order, and the first failure names the verdict:

1. by itself: finite, not flat, of the size asked for. A picture that fails cannot be compared: *invalid*.
2. against the unfused picture of the same run. This pair shares hardware and libraries, so it holds a tight limit
   everywhere: beyond it, *regression*.
3. against the golden, the approved picture of this kind of device: beyond its limit, *regression*.

A case without a golden is *no-golden*, which is never a pass: approving is a person's act.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from lora_fuse.regression.metrics import METRICS, Levels, is_flat

Size: TypeAlias = tuple[int, int]  # width, height in pixels
Scalar: TypeAlias = float | int | bool | str | None


class Verdict(StrEnum):
    """What is said of a case, from best to worst.

    A regression ranks above a missing golden: approving new goldens must not be the way out of a regression.
    """

    EXACT = "exact"  # the golden, bit for bit
    DRIFT = "drift"  # not the golden, and within its limits
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


Values: TypeAlias = Mapping[str, float | None]  # by metric, as `metrics.METRICS` names them


@dataclass(frozen=True, slots=True)
class Limits:
    """How far two pictures may be apart: a bound for each metric that decides, by its name in `metrics.METRICS`.

    The values and what they separate are in `conf/regress/`. No metric sees everything: PSNR sees a change of the whole
    picture and misses a small patch, the worst block sees the patch, only the comb sees a faint grid.
    """

    bounds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The distances between two pictures, by metric; the PSNR of identical ones is None: JSON has no infinity."""

    values: Values

    @property
    def identical(self) -> bool:
        """Whether every level is the same."""
        return self.values["psnr_db"] is None


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of a picture by itself; `nonfinite` counts the values that were NaN or infinite before rounding."""

    size: Size
    nonfinite: int
    flat: bool


@dataclass(frozen=True, slots=True)
class Subject:
    """What a case asked for; `size` is None where the choice was left to the pipeline."""

    name: str
    prompt: str
    seed: int
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A rendered or approved picture, and how many of its values were not finite before rounding."""

    levels: Levels
    nonfinite: int = 0

    @property
    def facts(self) -> Facts:
        """What is true of it by itself."""
        height, width = self.levels.shape[:2]
        return Facts((width, height), self.nonfinite, is_flat(self.levels))


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A judged case. `reasons` are whole sentences with both values; a comparison that was not possible is None."""

    subject: Subject
    facts: Facts
    vs_unfused: Comparison | None
    vs_golden: Comparison | None
    verdict: Verdict
    reasons: tuple[str, ...]


def compare(a: Levels, b: Levels) -> Comparison:
    """Measure two pictures against each other.

    Raises:
        ValueError: they differ in size.
    """
    measured = {name: metric.measure(a, b) for name, metric in METRICS.items()}
    return Comparison({name: None if math.isinf(value) else value for name, value in measured.items()})


def judge(
    facts: Mapping[str, Facts],
    vs_unfused: Comparison | None,
    vs_golden: Comparison | None,
    *,
    asked: Size | None,
    unfused_limits: Limits,
    golden_limits: Limits,
) -> tuple[Verdict, tuple[str, ...]]:
    """Decide a case.

    Args:
        facts: of the pictures by name: "merged", "unfused" and, where there is one, "golden".
        vs_unfused: merged against unfused; None if that was not possible, which is never a pass.
        vs_golden: merged against golden; None without a golden.
        asked: the size that the case asks for.
        unfused_limits: for the first pair.
        golden_limits: for the second.

    Returns:
        The verdict and the sentences that say why.
    """
    faults = [*_faults(facts), *_wrong_sizes(facts, asked)]
    if faults or vs_unfused is None:
        return Verdict.INVALID, tuple(faults) or ("The merged picture was not compared with the unfused one.",)
    broken = beyond(vs_unfused, unfused_limits, "the unfused picture of this run")
    if vs_golden is not None:
        broken += beyond(vs_golden, golden_limits, "the golden")
    if broken:
        return Verdict.REGRESSION, tuple(broken)
    if vs_golden is None:
        return Verdict.NO_GOLDEN, ("No picture was approved for this case on this kind of device.",)
    if vs_golden.identical:
        return Verdict.EXACT, ()
    return Verdict.DRIFT, (f"Not the golden bit for bit, and within its limits: {_measured(vs_golden)}.",)


def examine(
    subject: Subject,
    merged: Picture,
    unfused: Picture,
    golden: Levels | None,
    *,
    unfused_limits: Limits,
    golden_limits: Limits,
) -> CaseResult:
    """Measure and judge the pictures of one case."""
    facts = {"merged": merged.facts, "unfused": unfused.facts}
    if golden is not None:
        facts["golden"] = Picture(golden).facts
    vs_unfused = _compare_if_possible(merged.levels, unfused.levels)
    vs_golden = None if golden is None else _compare_if_possible(merged.levels, golden)
    verdict, reasons = judge(
        facts,
        vs_unfused,
        vs_golden,
        asked=subject.size,
        unfused_limits=unfused_limits,
        golden_limits=golden_limits,
    )
    return CaseResult(subject, facts["merged"], vs_unfused, vs_golden, verdict, reasons)


def flat_metrics(results: Iterable[CaseResult]) -> dict[str, Scalar]:
    """The judged cases as `metrics.json` has them: `passed`, `verdict`, and one level of dotted keys per case.

    ``{case}.verdict``, ``{case}.reasons`` and, for both pairs, ``{case}.golden.psnr_db`` and so on. Every case has
    every key (null where nothing was measured), so that a difference between two runs shows.
    """
    listed = list(results)
    overall = worst(result.verdict for result in listed)
    flat: dict[str, Scalar] = {"passed": overall.passed, "verdict": overall.value}
    for result in listed:
        name = result.subject.name
        flat[f"{name}.verdict"] = result.verdict.value
        flat[f"{name}.reasons"] = " ".join(result.reasons)
        for pair, comparison in (("golden", result.vs_golden), ("unfused", result.vs_unfused)):
            values = dict.fromkeys(METRICS) if comparison is None else comparison.values
            flat |= {f"{name}.{pair}.{metric}": value for metric, value in values.items()}
            flat[f"{name}.{pair}.identical"] = comparison is not None and comparison.identical
    return flat


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


def _compare_if_possible(a: Levels, b: Levels) -> Comparison | None:
    return compare(a, b) if a.shape == b.shape else None


def beyond(comparison: Comparison, limits: Limits, other: str) -> list[str]:
    """A sentence for each limit that does not hold; written so that a NaN holds none."""
    sentences = []
    for name, bound in limits.bounds.items():
        metric, value = METRICS[name], comparison.values[name]
        if value is None:
            continue  # the PSNR of identical pictures
        if not (value >= bound if metric.higher_is_nearer else value <= bound):
            side = "below" if metric.higher_is_nearer else "above"
            sentences.append(
                f"{metric.title[0].upper()}{metric.title[1:]} to {other} is {metric.text(value)}, {side} {metric.bound_text(bound)}."
            )
    return sentences


def _measured(comparison: Comparison) -> str:
    shown = ("psnr_db", "max_abs", "flip_worst")
    return ", ".join(f"{METRICS[name].title} {METRICS[name].text(comparison.values[name])}" for name in shown)
