"""The scale to take, and the reasons. Pure: numbers in, sentences out.

A distillation LoRA has a teacher, the base at its own number of steps: the best scale is the one whose pictures are
nearest to the teacher's. Any other LoRA has none, and no number knows taste: recommended is the largest scale that
does no damage, which is a bound and not an opinion.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NEAREST_BY = "latents_l2"
SECOND_BY = "flip"
TITLES = {"latents_l2": "latents, relative L2", "flip": "FLIP"}
NAMED = 4  # cases, beyond which they are counted
FLAT = 0.05  # of the best distance: differences below it are not worth a choice


@dataclass(frozen=True, slots=True)
class Tried:
    """One point as it is judged."""

    label: str  # its overrides, ``fuse.scale=0.8``
    series: str  # those besides its scale, ``lora=v2``; empty if nothing
    scale: float  # `fuse.scale`
    # To the base's own pictures, by metric, the mean over the cases; what was not measured is left out.
    distances: Mapping[str, float] = field(default_factory=dict)
    cases: Mapping[str, float] = field(default_factory=dict)  # the distance by `NEAREST_BY` of each case
    floor: float = 0.0  # the latents' change by rounding the weights alone, relative L2, the mean over the cases
    damage: tuple[str, ...] = ()  # faults of its pictures or weights, as sentences


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The point to take, None if there is none, and the reason as sentences.

    `value` and `runner_up_value` are distances by `metric`; None where nothing was compared.
    """

    label: str | None
    scale: float | None
    reasons: tuple[str, ...]
    metric: str | None = None
    value: float | None = None
    runner_up: str | None = None
    runner_up_value: float | None = None

    @property
    def reason(self) -> str:
        """All sentences."""
        return " ".join(self.reasons)


def nearest_to_teacher(tried: Sequence[Tried], *, steps: int, teacher_steps: int, loras: int = 1) -> Recommendation:
    """The point whose pictures are nearest to the base's own.

    Of several `loras` the teacher knows but one.

    Raises:
        ValueError: the LoRA saves no steps, so the base is not its teacher.
    """
    if steps >= teacher_steps:
        raise ValueError(f"{steps} steps with the LoRA and {teacher_steps} without: the base is not its teacher")
    sound = [point for point in tried if not point.damage]
    usable = [point for point in sound if math.isfinite(point.distances.get(NEAREST_BY, math.nan))]
    if not usable:
        return _none(tried, "could be compared with the base's own pictures" if sound else "has sound pictures")
    first, *others = sorted(usable, key=lambda point: (point.distances[NEAREST_BY], abs(point.scale - 1.0)))
    best = first.distances[NEAREST_BY]
    title = TITLES[NEAREST_BY]
    teacher = f"those of the base alone in {teacher_steps} steps, which the LoRA is there to give"
    mean = f"{title} {best:.3g}, the geometric mean over the cases"
    reasons = [f"Its {steps}-step pictures are nearest to {teacher}: {mean}."]
    runner_up = others[0] if others else None
    if runner_up is not None:
        second = runner_up.distances[NEAREST_BY]
        near = max(first.floor, FLAT * best)
        reasons.append(f"Runner-up: {runner_up.label} with {second:.3g}.")
        if others[-1].distances[NEAREST_BY] - best <= near:
            reasons.append(f"The curve is flat: all are within {near:.2g} of it, so the scale hardly matters here.")
        elif second - best <= near:
            reasons.append(f"The two are within {near:.2g} of each other: either will do.")
    reasons += [*_by_case(first, usable), *_by_another_metric(first, usable)]
    reasons += _at_the_edge(first, [point for point in tried if point.series == first.series])
    if loras > 1:
        reasons.append(f"{loras} LoRAs are fused and the base knows the look of none but the distilled one: look too.")
    runner = (runner_up.label, runner_up.distances[NEAREST_BY]) if runner_up is not None else (None, None)
    return Recommendation(first.label, first.scale, tuple(reasons), NEAREST_BY, best, *runner)


def largest_undamaged(tried: Sequence[Tried], *, steps: int) -> Recommendation:
    """The largest scale whose pictures are sound, for a LoRA without a teacher: it takes as many steps as the base."""
    sound = [point for point in tried if not point.damage]
    if not sound:
        return _none(tried, "has sound pictures")
    best = max(sound, key=lambda point: point.scale)
    without = f"The LoRA runs in {steps} steps as the base does, so there is no teacher to be near to"
    sound_is = "finite, not flat, no grid, not washed out, and no more clipped or noisy than the base alone"
    reasons = [
        f"{without}, and no number says how much of a style is right.",
        f"This is the largest scale without damage: {sound_is}.",
    ]
    beyond = [point for point in tried if point.damage and point.scale > best.scale and point.series == best.series]
    if beyond:
        worse = min(beyond, key=lambda point: point.scale)
        reasons.append(f"{worse.label} is damaged: {worse.damage[0]}")
    else:
        reasons += _at_the_edge(best, [point for point in tried if point.series == best.series])
    reasons.append("Choose by eye among those up to it.")
    return Recommendation(best.label, best.scale, tuple(reasons))


def _none(tried: Sequence[Tried], what: str) -> Recommendation:
    if not tried:
        return Recommendation(None, None, ("No point was built.",))
    first = next((f" {point.label}: {point.damage[0]}" for point in tried if point.damage), "")
    return Recommendation(None, None, (f"None of {len(tried)} points {what}.{first}",))


def _by_case(first: Tried, usable: Sequence[Tried]) -> list[str]:
    """A sentence if the cases do not agree; of many, with their numbers."""
    cases = [case for case in first.cases if all(case in point.cases for point in usable)]
    best = {case: min(usable, key=lambda point: point.cases[case]).label for case in cases}
    labels = [label for label, _ in Counter(best.values()).most_common()]
    if len(labels) < 2:
        return []
    named = {label: [case for case in cases if best[case] == label] for label in labels}
    if len(cases) <= NAMED:
        nearest = ", ".join(f"at {label} is {' and '.join(names)}" for label, names in named.items())
    else:
        nearest = ", ".join(f"at {label} are {len(names)}" for label, names in named.items())
    return [f"The cases differ: nearest {nearest}."]


def _by_another_metric(first: Tried, usable: Sequence[Tried]) -> list[str]:
    known = [point for point in usable if math.isfinite(point.distances.get(SECOND_BY, math.nan))]
    if first not in known or len(known) < 2:
        return []
    other = min(known, key=lambda point: point.distances[SECOND_BY])
    title = TITLES[SECOND_BY]
    own = first.distances[SECOND_BY]
    if other.distances[SECOND_BY] >= own:
        return [f"{title} of the finished pictures says the same ({own:.3g})."]
    return [
        f"{title} of the finished pictures would take {other.label} ({other.distances[SECOND_BY]:.3g}, here {own:.3g})."
    ]


def _at_the_edge(best: Tried, row: Sequence[Tried]) -> list[str]:
    scales = sorted({point.scale for point in row})
    if len(scales) < 2 or best.scale not in (scales[0], scales[-1]):
        return []
    side = "below" if best.scale == scales[0] else "above"
    return [f"It is at the edge of the sweep: sweep further, {side} {best.scale:g}."]
