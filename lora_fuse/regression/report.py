"""The report of a regression run: one HTML file to look at, and a few lines for the terminal.

The HTML holds its pictures, styles and the dozen lines of script that move its sliders, and asks the network for
nothing: it can be mailed, kept as a CI artifact and opened in ten years. Failures come first. Nothing is decided here:
verdicts and sentences come from `verdicts`, and this module only shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import Rerun
from lora_fuse.pictures import pages

if TYPE_CHECKING:
    from lora_fuse.pictures import encode, metrics
    from lora_fuse.regression.verdicts import CaseResult, Comparison, Limits, Rules, Verdict

# What a verdict means to somebody who never read the documentation.
MEANINGS: Mapping[str, str] = {
    "exact": "every picture is the approved one, bit for bit",
    "drift": "not every picture is the approved one bit for bit, and all are within their limits",
    "review": "there is a case that was approved in another environment only, and is within the limits of that picture",
    "no-golden": "there is a case without an approved picture",
    "regression": "there is a picture outside its limits",
    "invalid": "there is a broken picture: not finite, flat or of the wrong size",
}


@dataclass(frozen=True, slots=True)
class LoraRow:
    """A LoRA as it went into the merge; `label` says where it is from, `sha256` is of its file."""

    name: str
    label: str
    sha256: str
    scale: float


@dataclass(frozen=True, slots=True)
class BuiltFrom:
    """What was merged and how it was run; `sigmas` are those that the merged pipeline visited."""

    base: str
    loras: tuple[LoraRow, ...]
    pipeline: str
    steps: int
    true_cfg_scale: float
    scheduler_shift: str
    sigmas: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BlockChange:
    """How much the LoRAs change a block: the largest relative norm of the difference of any of its weights."""

    block: str
    relative_norm: float


@dataclass(frozen=True, slots=True)
class WeightsCheck:
    """What the weights' own check found: the merge derived again, independently, row by row."""

    passed: bool
    targets: int
    rows_checked: int
    rows_total: int
    problems: tuple[str, ...]
    blocks: tuple[BlockChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Baseline:
    """The base alone at its own settings: its picture, and both times in seconds."""

    picture: encode.Encoded
    steps: int
    true_cfg_scale: float
    seconds: float
    merged_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as long the base takes."""
        return self.seconds / self.merged_seconds


@dataclass(frozen=True, slots=True)
class CaseReport:
    """A judged case and its pictures.

    `heat` are maps of where merged differs, by what it is compared with; `cost` says what the merged picture took;
    `changed` what is not as it was when the golden was approved, None where there is none.
    """

    result: CaseResult
    inputs: tuple[encode.Encoded, ...]
    merged: encode.Encoded
    unfused: encode.Encoded
    golden: encode.Encoded | None
    heat: Mapping[str, encode.Encoded] = field(default_factory=dict)
    cost: str = ""
    changed: tuple[str, ...] | None = None
    baseline: Baseline | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows.

    `next_step` is a command; `environment` is shown in its own order; `warnings` are shown loudly; `heat_top` is the
    difference, in levels, from which on a heat map is brightest.
    """

    recipe: str
    verdict: Verdict
    next_step: str
    built_from: BuiltFrom
    weights: WeightsCheck
    environment: Mapping[str, str]
    warnings: tuple[str, ...]
    rules: Rules
    cases: tuple[CaseReport, ...]
    heat_top: int = 64


@dataclass(frozen=True, slots=True)
class _Gate:
    """One of the three gates as a tile: what it asks, the answer in a word, and a sentence."""

    title: str
    state: str
    sentence: str


def report_html(report: Report) -> str:
    """The page: one self-contained file, failures first. Its size is about 4/3 of its pictures'."""
    cases = sorted(report.cases, key=lambda case: -case.result.verdict.severity)  # stable: else in the given order
    shown = [(case, _metric_rows(case.result, report.rules)) for case in cases]
    passed = sum(case.result.verdict.passed for case in cases)
    return pages.render_page(
        "lora_fuse.regression",
        "report.html.j2",
        report=report,
        cases=shown,
        passed=passed,
        gates=_gates(report),
        changed=_changed(report.cases),
        meanings=MEANINGS,
    )


def _gates(report: Report) -> list[_Gate]:
    weights, total = report.weights, len(report.cases)
    apart = [case.result.case.name for case in report.cases if not case.result.agrees]
    verdicts = [str(case.result.verdict) for case in report.cases]
    near = sum(verdict in ("exact", "drift") for verdict in verdicts)
    unknown = sum(verdict in ("no-golden", "review") for verdict in verdicts)
    checked = f"{weights.targets:,} weights derived again, {weights.rows_checked:,} of {weights.rows_total:,} rows"
    return [
        _Gate("Weights", "passed" if weights.passed else "failed", f"{checked}."),
        _Gate(
            "Merged = base + LoRA",
            "failed" if apart else "passed",
            f"Not in {', '.join(apart)}." if apart else f"In {total} of {total} cases, within this run.",
        ),
        _Gate(
            "As approved",
            "passed" if near == total else "open" if near + unknown == total else "failed",
            f"{near} of {total} cases{f', {unknown} not approved here' if unknown else ''}.",
        ),
    ]


def _changed(cases: Sequence[CaseReport]) -> list[tuple[str, str]] | None:
    """What is not as it was approved, and in which cases; None if no case has a golden."""
    known = [case for case in cases if case.changed is not None]
    found: dict[str, list[str]] = {}
    for case in known:
        for sentence in case.changed or ():
            found.setdefault(sentence, []).append(case.result.case.name)
    everywhere = len(known)
    return (
        [(sentence, "" if len(names) == everywhere else ", ".join(names)) for sentence, names in found.items()]
        if known
        else None
    )


def next_step(metrics: Mapping[str, Any]) -> Rerun:
    """The step that comes after a run, from what `metrics.json` says of it."""
    match metrics["verdict"]:
        case "exact" | "drift":
            return Rerun("publish")
        case "review" | "no-golden":
            return Rerun("approve")
    names = case_names(metrics)
    changed = [name for name in names if metrics[f"{name}.verdict"] == "regression"]
    if metrics["verdict"] == "regression" and all(metrics[f"{name}.agrees"] for name in names):
        return Rerun("approve", cases=tuple(changed))
    return Rerun("verify", settings=(f"recipe={metrics['recipe']}", "verify.rows=all"))


def summary_text(metrics: Mapping[str, Any], report_path: str, then: str) -> str:
    """A table of the cases and the verdict, aligned for a terminal, without colours.

    Args:
        metrics: the content of `metrics.json`, as `verdicts.flat_metrics` makes it.
        report_path: where the page is.
        then: the command that comes next.
    """
    names = case_names(metrics)
    rows = [("case", "verdict", "PSNR to golden", "max diff", "PSNR to unfused", "max diff", "over floor", "seconds")]
    for name in names:
        pairs = [text for pair in ("golden", "unfused") for text in _flat_pair(metrics, f"{name}.{pair}")]
        more = [
            _number(metrics.get(f"{name}.{key}"), digits) for key, digits in (("over_floor", ".2f"), ("seconds", ".2f"))
        ]
        rows.append((name, metrics[f"{name}.verdict"], *pairs, *more))
    lines = _aligned(rows)
    for name in names:
        if metrics[f"{name}.verdict"] != "exact":
            lines.append(f"{name}: {metrics[f'{name}.reasons']}")
    passed = "passed" if metrics["passed"] else "FAILED"
    verdict = metrics["verdict"]
    ending = [f"{passed}, {verdict}: {MEANINGS[verdict]}", f"report: {report_path}", f"next: {then}"]
    return "\n".join([*lines, "", *ending])


def case_names(metrics: Mapping[str, Any]) -> list[str]:
    """The cases of a `metrics.json`, in its order."""
    return [key.removesuffix(".verdict") for key in metrics if key.endswith(".verdict")]


def _flat_pair(metrics: Mapping[str, Any], pair: str) -> tuple[str, str]:
    if metrics[f"{pair}.max_abs"] is None:
        return "-", "-"
    psnr = "identical" if metrics[f"{pair}.identical"] else f"{metrics[f'{pair}.psnr_db']:.2f} dB"
    return psnr, f"{metrics[f'{pair}.max_abs']:g}"


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns two spaces apart: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


@dataclass(frozen=True, slots=True)
class _Cell:
    """A measured value as text, its limit as text (empty without one), and whether it holds."""

    value: str
    limit: str = ""
    holds: bool = True


@dataclass(frozen=True, slots=True)
class _Row:
    """A metric of one case, to the golden, to the unfused picture, and of the noise floor."""

    title: str
    golden: _Cell
    unfused: _Cell
    floor: _Cell


def _metric_rows(result: CaseResult, rules: Rules) -> list[_Row]:
    from lora_fuse.pictures import metrics
    from lora_fuse.regression.verdicts import Limits

    rows = [
        _Row(
            metric.title,
            _cell(name, metric, result.vs_golden, result.golden_limits),
            _cell(name, metric, result.vs_unfused, result.unfused_limits),
            _cell(name, metric, result.floor, Limits({})),
        )
        for name, metric in metrics.METRICS.items()
    ]
    over = result.over_floor
    if over is not None:
        limit = "" if rules.over_floor is None else f"≤ {rules.over_floor:g} x"
        holds = rules.over_floor is None or over <= rules.over_floor
        rows.append(_Row("latents over the floor", _Cell("-"), _Cell(f"{over:.2f} x", limit, holds), _Cell("1 x")))
    return rows


def _cell(name: str, metric: metrics.Metric, comparison: Comparison | None, limits: Limits) -> _Cell:
    value = None if comparison is None else comparison.values.get(name)
    if value is None:
        return _Cell("-")
    bound = limits.bounds.get(name)
    if bound is None:
        return _Cell(metric.text(value))
    sign = "≥" if metric.higher_is_nearer else "≤"
    return _Cell(metric.text(value), f"{sign} {metric.bound_text(bound)}", metric.holds(value, bound))
