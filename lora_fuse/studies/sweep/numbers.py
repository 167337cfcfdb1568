"""From the flat numbers of a point's `metrics.json` to what a sweep compares. Pure.

Beside the keys of a run's `metrics.json` a point's has, for each case, ``{case}.baseline.{metric}`` (merged against the
base alone), and ``{case}.damage.{measure}`` with ``{case}.baseline_damage.{measure}`` (each picture by itself).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from lora_fuse.pictures import damage, metrics, picture
from lora_fuse.regression import gate, review, verdicts
from lora_fuse.studies.sweep.recommendation import NEAREST_BY, SECOND_BY

# What is damage, by the base's own picture: words, how many times its value, and how much above that.
DAMAGE = {
    "clipped": ("clipped values", 1.5, 0.02),
    "noise": ("noise", 1.5, 0.5),
    "comb": ("comb of a grid", 1.0, 3.0),
    "detail": ("detail", 0.2, 0.0),  # of this one, less is worse: rabbit of pocket with pastel .81 at scale 2, .17 at 3
}

RATIOS = {"latents_l2", "flip", "flip_worst", "mean_abs"}  # distances of which twice as much is twice as far
DECIDING = (NEAREST_BY, SECOND_BY)
SMALLEST = 1e-9  # stands for a distance of 0, of which there is no logarithm
OWN = {
    "clipped": "clipped values, share",
    "noise": "noise, levels",
    "detail": "detail, levels",
    "comb": "comb of a grid, dB",
    "over_floor": "merged to unfused, times the noise floor",
}
NEARER = {
    f"baseline.{name}": "higher is nearer" if metric.higher_is_nearer else "lower is nearer"
    for name, metric in metrics.METRICS.items()
}


def title_of(key: str) -> str:
    """The title of a number of `curves`."""
    side, _, name = key.rpartition(".")
    if name in metrics.METRICS:
        metric = metrics.METRICS[name]
        unit = f", {metric.unit.strip()}" if metric.unit else ""
        return f"{metric.title}{unit}, to the {'base alone' if side == 'baseline' else 'golden (a gap: identical)'}"
    return OWN[name]


def against_baseline(case: str, merged: picture.Picture, alone: picture.Picture) -> dict[str, review.Scalar]:
    """The keys that a sweep adds to a case: the merged checkpoint's picture beside the base's alone."""
    same_size = merged.levels.shape == alone.levels.shape
    sound = not alone.nonfinite and not damage.is_flat(alone.levels)
    compared = verdicts.compare(merged, alone) if same_size and sound else None
    values = {} if compared is None else {key: value for key, value in compared.values.items() if math.isfinite(value)}
    found: dict[str, review.Scalar] = {f"{case}.baseline.{name}": values.get(name) for name in metrics.METRICS}
    for key, side in (("damage", merged), ("baseline_damage", alone)):
        found |= {f"{case}.{key}.{name}": measure(side.levels) for name, measure in damage.MEASURES.items()}
    return found


def mean_of(metrics: Mapping[str, Any], key: str) -> float | None:
    """The mean over the cases of ``{case}.{key}``; None if a case has no such number.

    Of distances it is the geometric one, as the mean of dB is by itself: a case that is far off at any scale, because
    the model cannot do it, does not outvote those that the scale decides.
    """
    found = by_case(metrics, key)
    if not found or len(found) < len(gate.case_names(metrics)):
        return None
    if key.rpartition(".")[2] in RATIOS:
        return geometric_mean([max(value, SMALLEST) for value in found.values()])
    return fmean(found.values())


def by_case(metrics: Mapping[str, Any], key: str) -> dict[str, float]:
    """``{case}.{key}`` of every case that has such a number."""
    values = {case: metrics.get(f"{case}.{key}") for case in gate.case_names(metrics)}
    return {case: float(value) for case, value in values.items() if isinstance(value, int | float)}


def distances(numbers: Mapping[str, Any]) -> dict[str, float]:
    """To the base's own pictures, by metric, the mean over the cases."""
    found = {name: mean_of(numbers, f"baseline.{name}") for name in metrics.METRICS}
    return {name: value for name, value in found.items() if value is not None}


def broken(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Faults of the weights or the pictures of a point, as sentences; empty if there are none.

    Not being the golden is no fault here: that is of another scale.
    """
    found = [] if metrics["weights_passed"] else ["The merged weights are wrong."]
    cases = gate.case_names(metrics)
    return (*found, *(f"{case}: {metrics[f'{case}.reasons']}" for case in cases if not metrics[f"{case}.agrees"]))


def describe(metrics: Mapping[str, Any]) -> str:
    """A point in a few words, for a terminal."""
    distance = mean_of(metrics, f"baseline.{NEAREST_BY}")
    words = [] if distance is None else [f"latents {distance:.3g} from the base alone"]
    words.append(
        "merged is NOT base + LoRA" if failed(metrics) else "; ".join(broken(metrics)) or "merged is base + LoRA"
    )
    return ", ".join(words)


def failed(metrics: Mapping[str, Any]) -> bool:
    """True if the merge itself is wrong: its weights, or its pictures are not those of base + LoRA.

    A picture that is broken on both sides is what the scale does, and a finding.
    """
    apart = [case for case in gate.case_names(metrics) if not metrics[f"{case}.agrees"]]
    return not metrics["weights_passed"] or any(metrics[f"{case}.verdict"] != "invalid" for case in apart)


def worse_than_base(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Cases that are more clipped, noisier, more of a grid or more washed out than the base's, as sentences."""
    found = []
    for case in gate.case_names(metrics):
        for name in damage.MEASURES:
            words, times, more = DAMAGE[name]
            value, alone = (metrics[f"{case}.{side}.{name}"] for side in ("damage", "baseline_damage"))
            bound = alone * times + more
            if value < bound if times < 1 else value > bound:
                side = "below" if times < 1 else "above"
                found.append(f"{case}: {words} {value:.3g}, {side} {bound:.3g} (the base alone {alone:.3g}).")
    return tuple(found)


def curves(points: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """A number for each point, the mean over the cases, by the key that it has after the case's name."""
    ranked = [*DECIDING, *(name for name in metrics.METRICS if name not in DECIDING)]  # what decides comes first
    keys = [f"baseline.{name}" for name in ranked] + [f"damage.{name}" for name in damage.MEASURES]
    keys += ["over_floor", "golden.psnr_db"]
    found = {key: [mean_of(point, key) for point in points] for key in keys}
    return {key: values for key, values in found.items() if any(value is not None for value in values)}
