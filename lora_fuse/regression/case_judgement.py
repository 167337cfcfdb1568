"""Rendered pairs judged case by case: with each other, with their noise floor and with the goldens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from lora_fuse.machine import launch
from lora_fuse.pictures import Case, metrics, pairs, picture
from lora_fuse.regression.verdicts import CaseResult, Comparison, Facts, Golden, Rules, Size, Verdict, beyond, compare

SIGMA_TOLERANCE = 1e-4
WORKERS = min(8, os.cpu_count() or 1)  # cases whose pictures are written at once
MANY = 1 << 21  # pixels of what is compared, from which on processes are worth their start: a second a megapixel

Two: TypeAlias = tuple[picture.Picture, picture.Picture]
Compare: TypeAlias = Callable[[picture.Picture, picture.Picture], Comparison | None]


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair and what it came to; `exports` compares each export's picture with the merged one."""

    pair: pairs.Pair
    result: CaseResult
    exports: Mapping[str, Comparison | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The case's name."""
        return self.pair.case.name


def judge_pairs(
    rendered: Sequence[pairs.Pair], goldens: Mapping[str, Sequence[Golden]], rules: Rules
) -> list[JudgedPair]:
    """Judge every pair, with the goldens by case; what is large is compared by several processes.

    Raises:
        ProcessLost: one of them was ended from outside.
    """
    wanted = [two for pair in rendered for two in _to_compare(pair, goldens.get(pair.case.name, ()))]
    compared = {(id(a), id(b)): found for (a, b), found in zip(wanted, _compare_all(wanted), strict=True)}

    def judge(pair: pairs.Pair) -> JudgedPair:
        approved = goldens.get(pair.case.name, ())
        of = (pair.case, pair.merged, pair.unfused, approved, rules, pair.floor)
        exports = {name: compared[id(export), id(pair.merged)] for name, export in pair.exports.items()}
        return JudgedPair(pair, examine(*of, compared_by=lambda a, b: compared[id(a), id(b)]), exports)

    return [judge(pair) for pair in rendered]


def _to_compare(pair: pairs.Pair, goldens: Sequence[Golden]) -> list[Two]:
    """All that is compared of a pair."""
    with_goldens = [(pair.merged, golden) for golden in goldens]
    exports = [(export, pair.merged) for export in pair.exports.values()]
    return [(pair.merged, pair.unfused), (pair.floor, pair.unfused), *with_goldens, *exports]


def _compare_all(wanted: Sequence[Two]) -> list[Comparison | None]:
    """Compare all pictures; FLIP's library keeps Python's lock for a second a megapixel."""
    if sum(a.levels.size // 3 for a, _ in wanted) < MANY:
        return [_compare_if_possible(*two) for two in wanted]
    return launch.in_processes(_compare_two, [(_numbers(a), _numbers(b)) for a, b in wanted])


def _numbers(of: picture.Picture) -> picture.Picture:
    """A picture with nothing but what is compared."""
    return picture.Picture(of.levels, latents=of.latents)


def _compare_two(two: Two) -> Comparison | None:
    return _compare_if_possible(*two)


def examine(
    case: Case,
    merged: picture.Picture,
    unfused: picture.Picture,
    goldens: Sequence[Golden],
    rules: Rules,
    floor: picture.Picture | None = None,
    compared_by: Compare | None = None,
) -> CaseResult:
    """Compare the pictures of one case with each other, with the noise floor and with the goldens, and judge them.

    The goldens are all of one environment; `floor` is the unfused pipeline again, moved by as much as rounding does.
    `compared_by` gives comparisons that were made already.
    """
    by = compared_by or _compare_if_possible
    golden, vs_golden = _nearest_golden(merged, goldens, by) or (None, None)
    of_floor = None if floor is None else by(floor, unfused)
    measured = Measured(by(merged, unfused), of_floor, vs_golden, golden)
    facts = {"merged": Facts.of(merged), "unfused": Facts.of(unfused)}
    return judge_measured(case, facts, measured, rules, {"merged": merged.sigmas, "unfused": unfused.sigmas})


@dataclass(frozen=True, slots=True)
class Measured:
    """The distances of a case's pictures, as `CaseResult` has them."""

    vs_unfused: Comparison | None
    floor: Comparison | None
    vs_golden: Comparison | None
    golden: Golden | None


def judge_measured(
    case: Case,
    facts: Mapping[str, Facts],
    measured: Measured,
    rules: Rules,
    sigmas: Mapping[str, Sequence[float]],
) -> CaseResult:
    """Judge what was measured; facts and the visited sigmas are by pipeline, ``merged`` and ``unfused``."""
    floor_here = None if measured.floor is None else measured.floor.values
    floor_then = None if measured.golden is None else measured.golden.floor
    result = CaseResult(
        case,
        facts["merged"],
        measured.vs_unfused,
        measured.floor,
        measured.vs_golden,
        measured.golden,
        agrees=False,
        verdict=Verdict.INVALID,
        reasons=(),
        unfused_limits=rules.unfused.over(rules.over_floor, floor_here),
        golden_limits=rules.golden.over(rules.over_floor, floor_here, floor_then),
    )
    faults = [*_faults(facts), *_wrong_sizes(facts, case.size)]
    if faults:
        return replace(result, reasons=tuple(faults))
    apart = [*_wrong_sigmas(sigmas, rules.sigmas), *_disagreement(result, rules)]
    verdict, reasons = _against_golden(result, apart)
    return replace(result, agrees=not apart, verdict=verdict, reasons=tuple(reasons))


def _nearest_golden(
    merged: picture.Picture, goldens: Sequence[Golden], by: Compare
) -> tuple[Golden, Comparison | None] | None:
    """The golden that has the least error to the picture; one of another size only if there is no other."""
    compared = [(golden, by(merged, golden)) for golden in goldens]
    return max(compared, key=lambda pair: -1.0 if pair[1] is None else pair[1].values["psnr_db"], default=None)


def _disagreement(result: CaseResult, rules: Rules) -> list[str]:
    """Sentences on what separates merged and unfused."""
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
    golden = result.golden
    compared = result.vs_golden
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
    size = "{}x{}".format
    return [f"The golden {golden.name} is {size(*golden.size)}, and the merged picture {size(*result.facts.size)}."]


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


def _wrong_sigmas(visited: Mapping[str, Sequence[float]], wanted: tuple[float, ...] | None) -> list[str]:
    if wanted is None:
        return []
    return [
        f"The {name} pipeline visited the sigmas {_listed(sigmas[:-1])}, the recipe's are {_listed(wanted)}."
        for name, sigmas in visited.items()
        if len(sigmas) != len(wanted) + 1
        or not all(abs(a - b) <= SIGMA_TOLERANCE for a, b in zip(sigmas, wanted, strict=False))
    ]


def _listed(sigmas: Iterable[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)


def _compare_if_possible(a: picture.Picture, b: picture.Picture) -> Comparison | None:
    return compare(a, b) if a.levels.shape == b.levels.shape else None


def _measured(comparison: Comparison | None) -> str:
    if comparison is None:
        return "not measured"
    shown = [(metrics.METRICS[name], comparison.values[name]) for name in ("psnr_db", "max_abs", "flip_worst")]
    return ", ".join(f"{metric.title} {metric.text(value)}" for metric, value in shown)


def save_pictures(judged: Sequence[JudgedPair], folder: Path) -> None:
    """Write ``CASE.merged.png``, ``CASE.unfused.png`` and so on, lossless; an approval copies the first."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(case: JudgedPair) -> None:
        sides = {"merged": case.pair.merged, "unfused": case.pair.unfused, "baseline": case.pair.baseline}
        sides |= case.pair.exports
        for side, rendered in sides.items():
            if rendered is not None:
                (folder / f"{case.name}.{side}.png").write_bytes(rendered.png)

    with ThreadPoolExecutor(WORKERS, "save") as pool:
        list(pool.map(save, judged))
