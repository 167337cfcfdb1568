"""Rendered pairs judged case by case: with each other, with their noise floor and with the goldens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, TypeAlias

from lora_fuse.machine import launch
from lora_fuse.pictures import Case, metrics, pairs, picture
from lora_fuse.regression.verdicts import (
    CaseResult,
    Comparison,
    Facts,
    Golden,
    Rules,
    Size,
    Values,
    Verdict,
    beyond,
    compare,
)

SIGMA_TOLERANCE = 1e-4
LARGE = 1 << 18  # pixels of a picture, from which on processes are worth their start: three seconds a megapixel

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


class Comparisons:
    """Comparisons of a run's pictures, those of large ones by processes beside this one, which end with the `with`.

    FLIP's library keeps Python's lock for a second a megapixel.
    """

    def __init__(self, goldens: Mapping[str, Sequence[Golden]], *, beside: bool = False) -> None:
        """Start nothing yet; `goldens` are by case, `beside` says that cores are idle while pictures are made."""
        self._goldens = goldens
        self._beside = beside
        self._sides: dict[str, dict[str, picture.Picture]] = {}  # by case
        self._begun: dict[tuple[str, str, str], list[Callable[[], Values]]] = {}  # by case and both sides
        self._workers = launch.WorkerProcesses()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    def while_made(self, side: str, case: str, made: picture.Picture) -> None:
        """As `take`, of a picture that was just made while others are to come, where cores are idle."""
        if self._beside:
            self.take(side, case, made)

    def take(self, side: str, case: str, made: picture.Picture) -> None:
        """Take a picture of a case, once, and begin to compare it with those that are there.

        `side` is its name as in the progress, as ``merged`` or ``export FORMAT``.

        Raises:
            ProcessLost: one of the processes was ended from outside.
        """
        named = {f"golden {golden.name}": golden for golden in self._goldens.get(case, ())}
        sides = self._sides.setdefault(case, dict(named))
        if side in sides:
            return
        sides[side] = made
        for one, other in _to_compare(sides):
            a = sides[one]
            b = sides[other]
            if side in (one, other) and a.levels.size // 3 >= LARGE and _are_worth_it(a, b):
                self._begun[case, one, other] = [
                    self._workers.begin(metrics.distances, a.levels, b.levels, part) for part in metrics.PARTS
                ]

    def judge(self, rendered: Sequence[pairs.Pair], rules: Rules) -> list[JudgedPair]:
        """Judge every pair by what was compared, or is now.

        Raises:
            ProcessLost: see `take`.
        """
        for pair in rendered:
            for side, made in _sides_of(pair).items():
                self.take(side, pair.case.name, made)
        return [self._judge(pair, rules) for pair in rendered]

    def _judge(self, pair: pairs.Pair, rules: Rules) -> JudgedPair:
        by = self._compare(pair.case.name, _sides_of(pair))
        approved = self._goldens.get(pair.case.name, ())
        exports = {name: by(export, pair.merged) for name, export in pair.exports.items()}
        result = examine(pair.case, pair.merged, pair.unfused, approved, rules, pair.floor, compared_by=by)
        return JudgedPair(pair, result, exports)

    def _compare(self, case: str, sides: Mapping[str, picture.Picture]) -> Compare:
        """A function that compares two of the sides of a case, which were taken, or one with a golden."""
        names = {id(made): side for side, made in {**self._sides[case], **sides}.items()}

        def compared(a: picture.Picture, b: picture.Picture) -> Comparison | None:
            parts = self._begun.get((case, names.get(id(a), ""), names.get(id(b), "")))
            if parts is None:
                return _compare_if_possible(a, b)
            values = {name: value for part in parts for name, value in part().items()}
            return compare(a, b, {name: values[name] for name in metrics.METRICS if name in values})

        return compared


def _to_compare(sides: Iterable[str]) -> list[tuple[str, str]]:
    """All that is compared of the sides of a case that are there."""
    goldens = [("merged", side) for side in sides if side.startswith("golden ")]
    exports = [(side, "merged") for side in sides if side.startswith("export ")]
    wanted = [("merged", "unfused"), ("floor", "unfused"), *goldens, *exports]
    return [(one, other) for one, other in wanted if one in sides and other in sides]


def _are_worth_it(a: picture.Picture, b: picture.Picture) -> bool:
    """True for two pictures that can be compared and are not the same."""
    return a.levels.shape == b.levels.shape and not metrics.is_same(a.levels, b.levels)


def judge_pairs(
    rendered: Sequence[pairs.Pair], goldens: Mapping[str, Sequence[Golden]], rules: Rules
) -> list[JudgedPair]:
    """Judge every pair, with the goldens by case, see `Comparisons.judge`."""
    with Comparisons(goldens) as compared:
        return compared.judge(rendered, rules)


def _sides_of(pair: pairs.Pair) -> Mapping[str, picture.Picture]:
    sides = {"merged": pair.merged, "unfused": pair.unfused, "floor": pair.floor}
    return sides | {f"export {name}": export for name, export in pair.exports.items()}


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
