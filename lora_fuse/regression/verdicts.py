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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from lora_fuse.pictures import Case, damage, metrics, picture
from lora_fuse.recipe import Recipe

Size: TypeAlias = tuple[int, int]  # width, height in pixels
Values: TypeAlias = Mapping[str, float]  # by metric, as `metrics.METRICS` names them

# What arithmetic in float32 leaves in the latents (relative L2), below which no floor is compared with.
FLOAT32_NOISE = 1e-5


class Verdict(StrEnum):
    """Verdicts on a case, from best to worst.

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
        """True for a verdict that lets a build through."""
        return self in {Verdict.EXACT, Verdict.DRIFT}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of a whole run; without any case, invalid: nothing was looked at."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.INVALID)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the distance of two pictures, for each metric that decides, by its name in `metrics.METRICS`.

    The values and what they separate are in `conf/regress/`. No metric sees everything: PSNR sees a change of the whole
    picture and misses a small patch, the worst block sees the patch, only the comb sees a faint grid.
    """

    bounds: Mapping[str, float]

    def over(self, times: float | None, *floors: Values | None) -> Limits:
        """The limits that can be held where rounding alone does `floors`: no bound is tighter than `times` the least.

        Some pictures are chaotic in 16 bits: one flipped rounding moves whole regions, whoever renders them. A floor
        that was not measured loosens nothing.
        """
        if times is None:
            return self
        bounds = {}
        for name, bound in self.bounds.items():
            metric = metrics.EVERY[name]
            measured = [(floor or {}).get(name, metric.best) for floor in floors]
            bounds[name] = metric.tightest(
                metric.loosened(bound, floor, times) if metric.can_be(floor) else bound for floor in measured
            )
        return Limits(bounds)


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits that a case is held to.

    Attributes:
        unfused: limits of merged against unfused.
        golden: limits of merged against golden.
        over_floor: how many times the noise floor the latents of that first pair may be apart, and the limits at
            least allow; None decides and changes nothing. Against a golden the lower of two floors counts, that of
            this run and that of the golden's: no record can say of itself how far a picture may be from it.
        sigmas: what the pipeline must visit, without the final 0; None leaves it open.
    """

    unfused: Limits
    golden: Limits
    over_floor: float | None = None
    sigmas: tuple[float, ...] | None = None

    @staticmethod
    def of(recipe: Recipe) -> Rules:
        """Read a recipe's limits."""
        regress = recipe.regress
        sigmas = recipe.sampling.sigmas
        limits = (Limits(regress.unfused.bounds), Limits(regress.golden.bounds))
        return Rules(*limits, regress.over_floor, None if sigmas is None else tuple(sigmas))


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
        """True where every level is the same."""
        return math.isinf(self.values["psnr_db"])


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of a picture by itself; `nonfinite` counts the values that were NaN or infinite before rounding."""

    size: Size
    nonfinite: int
    flat: bool

    @staticmethod
    def of(picture: picture.Picture) -> Facts:
        """Look at a picture alone."""
        flat = damage.is_flat(picture.levels if picture.frames is None else picture.frames)
        return Facts(picture.size, picture.nonfinite, flat)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A judged case. `reasons` are whole sentences with both values; a comparison that was not possible is None.

    `floor` compares the unfused pipeline with itself, moved by as much as rounding moves it; `agrees` says that merged
    and unfused are the same within their limits; `golden` is the one that the picture is nearest to. The limits are
    those that counted.
    """

    case: Case
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
        """Distance of the latents of merged and unfused, in noise floors; None where it was not measured."""
        return over_floor(self.vs_unfused, self.floor)


def over_floor(apart: Comparison | None, floor: Comparison | None) -> float | None:
    """Distance of a pair's latents in times of the floor's; None where either was not measured."""
    if apart is None or floor is None or "latents_l2" not in floor.values:
        return None
    return apart.values.get("latents_l2", math.nan) / max(floor.values["latents_l2"], FLOAT32_NOISE)


def compare(a: picture.Picture, b: picture.Picture, of_levels: Values | None = None) -> Comparison:
    """Measure two pictures against each other, their latents and their clips where both have them.

    `of_levels` are the distances of their levels where those are known already.

    Raises:
        ValueError: they differ in size.
    """
    values = dict(of_levels or metrics.distances(a.levels, b.levels))
    if a.latents is not None and b.latents is not None:
        values |= {name: m.measure(a.latents, b.latents) for name, m in metrics.METRICS.items() if m.of_latents}
    if a.clip and b.clip:
        values |= {name: m.measure(a.clip[name], b.clip[name]) for name, m in metrics.OF_CLIPS.items()}
    return Comparison(values)


def beyond(comparison: Comparison, limits: Limits, other: str) -> list[str]:
    """A sentence for each limit that does not hold; a NaN holds none."""
    sentences = []
    for name, bound in limits.bounds.items():
        if name in metrics.OF_CLIPS and name not in comparison.values:
            continue  # pictures do not flicker
        metric = metrics.EVERY[name]
        value = comparison.values[name]
        if not metric.holds(value, bound):
            side = "below" if metric.higher_is_nearer else "above"
            title = metric.title[0].upper() + metric.title[1:]
            sentences.append(f"{title} to {other} is {metric.text(value)}, {side} {metric.bound_text(bound)}.")
    return sentences
