"""The report of a regression run: one HTML file to look at.

Failures come first. Nothing is decided here: verdicts and sentences come from `verdicts`, and this module only shows
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_fuse.pictures import encode, metrics, pages, pairs
from lora_fuse.recipe import Manifest
from lora_fuse.regression.exported import Cell, JudgedExport, export_rows, trade_off
from lora_fuse.regression.gate import MEANINGS
from lora_fuse.regression.verdicts import CaseResult, Comparison, Limits, Rules, Verdict


@dataclass(frozen=True, slots=True)
class BlockChange:
    """The largest relative norm of the change of any of a block's weights."""

    block: str
    relative_norm: float


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
        """Time of the base over that of the merged checkpoint."""
        return self.seconds / self.merged_seconds


@dataclass(frozen=True, slots=True)
class CaseReport:
    """A judged case and its pictures.

    `heat` are maps of where merged differs, by what it is compared with; `cost` says what the merged picture took;
    `changed` what is not as it was when the golden was approved, None where there is none; `exports` are pictures by
    format; `clips` play what is merged and unfused.
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
    exports: Mapping[str, encode.Encoded] = field(default_factory=dict)
    clips: Mapping[str, encode.Encoded] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows.

    `next_step` is a command; `sigmas` are those that the merged pipeline visited; `verify` is the content of
    `verify.json`.
    """

    recipe: str
    verdict: Verdict
    next_step: str
    manifest: Manifest
    setup: pairs.Setup
    sigmas: tuple[float, ...]
    verify: Mapping[str, Any]
    blocks: tuple[BlockChange, ...]
    environment: Mapping[str, str]
    warnings: tuple[str, ...]
    rules: Rules
    cases: tuple[CaseReport, ...]
    exports: tuple[JudgedExport, ...] = ()


@dataclass(frozen=True, slots=True)
class _Gate:
    """One of the gates as a tile: what it asks, the answer in a word, and a sentence."""

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
        warnings=[*report.warnings, *report.verify.get("warnings", ())],
        update=report.verify.get("update", {}),
        kept=_kept(report.verify["changes"]),
        meanings=MEANINGS,
        heat_top=metrics.HEAT_TOP,
        large=encode.LARGE,
        export_rows=export_rows(report.exports),
        trade_off=trade_off(report.exports),
    )


def _gates(report: Report) -> list[_Gate]:
    verify = report.verify
    total = len(report.cases)
    apart = [case.result.case.name for case in report.cases if not case.result.agrees]
    verdicts = [str(case.result.verdict) for case in report.cases]
    near = sum(verdict in ("exact", "drift") for verdict in verdicts)
    unknown = sum(verdict in ("no-golden", "review") for verdict in verdicts)
    checked = (
        f"{verify['targets']:,} weights derived again, {verify['rows_checked']:,} of {verify['rows_total']:,} rows"
    )
    gates = [
        _Gate("Weights", "passed" if verify["passed"] else "failed", f"{checked}."),
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
    if report.exports:
        bad = [export.format for export in report.exports if not export.verdict.passed]
        sentence = f"Not {', '.join(bad)}." if bad else f"{len(report.exports)} formats, each within its limits."
        gates.append(_Gate("Exports = merged", "failed" if bad else "passed", sentence))
    return gates


def _kept(changes: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, Mapping[str, float | None]]]:
    """The targets by what they keep of the change that was meant, the least first."""
    cosines = {name: cosine for name, change in changes.items() if (cosine := change.get("cosine")) is not None}
    return [(name, changes[name]) for name in sorted(cosines, key=lambda name: (cosines[name], name))]


def _changed(cases: Sequence[CaseReport]) -> list[tuple[str, str]] | None:
    """Changes since the approval, each with its cases unless it is all of them; None if no case has a golden."""
    approved = [case for case in cases if case.changed is not None]
    changed: dict[str, list[str]] = {}
    for case in approved:
        for sentence in case.changed or ():
            changed.setdefault(sentence, []).append(case.result.case.name)
    if not approved:
        return None
    return [(sentence, "" if len(names) == len(approved) else ", ".join(names)) for sentence, names in changed.items()]


@dataclass(frozen=True, slots=True)
class _Row:
    """A metric of one case, to the golden, to the unfused picture, and of the noise floor."""

    title: str
    golden: Cell
    unfused: Cell
    floor: Cell


def _metric_rows(result: CaseResult, rules: Rules) -> list[_Row]:
    rows = [
        _Row(
            metric.title,
            _cell(name, metric, result.vs_golden, result.golden_limits),
            _cell(name, metric, result.vs_unfused, result.unfused_limits),
            _cell(name, metric, result.floor, Limits({})),
        )
        for name, metric in (metrics.METRICS if result.case.frames is None else metrics.EVERY).items()
    ]
    over = result.over_floor
    if over is not None:
        limit = "" if rules.over_floor is None else f"≤ {rules.over_floor:g} x"
        holds = rules.over_floor is None or over <= rules.over_floor
        rows.append(_Row("latents over the floor", Cell("-"), Cell(f"{over:.2f} x", limit, holds), Cell("1 x")))
    return rows


def _cell(name: str, metric: metrics.Metric, comparison: Comparison | None, limits: Limits) -> Cell:
    value = None if comparison is None else comparison.values.get(name)
    if value is None:
        return Cell("-")
    bound = limits.bounds.get(name)
    if bound is None:
        return Cell(metric.text(value))
    sign = "≥" if metric.higher_is_nearer else "≤"
    return Cell(metric.text(value), f"{sign} {metric.bound_text(bound)}", metric.holds(value, bound))
