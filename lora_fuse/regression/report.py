"""The report of a regression run: one HTML file to look at, and a few lines for the terminal.

The HTML holds its pictures and styles itself and asks the network for nothing, so it can be mailed, kept as a CI
artifact and opened in ten years. Failures come first. Nothing is decided here: verdicts and sentences come from
`verdicts`, and this module only shows them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

    from lora_fuse.regression.metrics import Metric
    from lora_fuse.regression.verdicts import CaseResult, Comparison, Limits, Verdict

# What a verdict means to somebody who never read the documentation.
MEANINGS: Mapping[str, str] = {
    "exact": "every picture is the approved one, bit for bit",
    "drift": "not every picture is the approved one bit for bit, and all are within their limits",
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
class WeightsCheck:
    """What the weights' own check found: the merge derived again, independently, row by row."""

    passed: bool
    targets: int
    rows_checked: int
    rows_total: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A picture of ``|merged - other|``, amplified `factor` times."""

    other: str
    factor: int
    png: bytes


@dataclass(frozen=True, slots=True)
class Baseline:
    """The base alone at its own settings: its picture, and both times in seconds."""

    png: bytes
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
    """A judged case and its pictures, all PNG files; `golden` is None where none was approved."""

    result: CaseResult
    inputs: tuple[bytes, ...]
    merged: bytes
    unfused: bytes
    golden: bytes | None
    differences: tuple[Difference, ...]
    baseline: Baseline | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows. `environment` is shown in its own order; `warnings` are shown loudly."""

    recipe: str
    verdict: Verdict
    built_from: BuiltFrom
    weights: WeightsCheck
    environment: Mapping[str, str]
    warnings: tuple[str, ...]
    unfused_limits: Limits
    golden_limits: Limits
    cases: tuple[CaseReport, ...]


def report_html(report: Report) -> str:
    """The page: one self-contained file, failures first. Its size is about 4/3 of its pictures'."""
    cases = sorted(report.cases, key=lambda case: -case.result.verdict.severity)  # stable: else in the given order
    shown = [(case, _metric_rows(case.result, report)) for case in cases]
    passed = sum(case.result.verdict.passed for case in cases)
    template = _environment().get_template("report.html.j2")
    return template.render(report=report, cases=shown, passed=passed, meanings=MEANINGS)


def summary_text(metrics: Mapping[str, Any], report_path: str) -> str:
    """A table of the cases and the verdict, aligned for a terminal, without colours.

    Args:
        metrics: the content of `metrics.json`, as `verdicts.flat_metrics` makes it.
        report_path: where the page is.
    """
    names = case_names(metrics)
    rows = [("case", "verdict", "PSNR to golden", "max diff", "PSNR to unfused", "max diff")]
    for name in names:
        pairs = [text for pair in ("golden", "unfused") for text in _flat_pair(metrics, f"{name}.{pair}")]
        rows.append((name, metrics[f"{name}.verdict"], *pairs))
    lines = _aligned(rows)
    for name in names:
        if metrics[f"{name}.verdict"] != "exact":
            lines.append(f"{name}: {metrics[f'{name}.reasons']}")
    passed = "passed" if metrics["passed"] else "FAILED"
    verdict = metrics["verdict"]
    return "\n".join([*lines, "", f"{passed}, {verdict}: {MEANINGS[verdict]}", f"report: {report_path}"])


def case_names(metrics: Mapping[str, Any]) -> list[str]:
    """The cases of a `metrics.json`, in its order."""
    return [key.removesuffix(".verdict") for key in metrics if key.endswith(".verdict")]


def _flat_pair(metrics: Mapping[str, Any], pair: str) -> tuple[str, str]:
    if metrics[f"{pair}.max_abs"] is None:
        return "-", "-"
    return decibels(metrics[f"{pair}.psnr_db"]), str(metrics[f"{pair}.max_abs"])


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


def decibels(value: float | None) -> str:
    """A PSNR as text; None is that of identical pictures."""
    return "identical" if value is None else f"{value:.2f} dB"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@dataclass(frozen=True, slots=True)
class _Cell:
    """A measured value as text, its limit as text (empty without one), and whether it holds."""

    value: str
    limit: str = ""
    holds: bool = True


def _metric_rows(result: CaseResult, report: Report) -> list[tuple[str, _Cell, _Cell]]:
    """(title, to the golden, to the unfused picture) for each metric."""
    from lora_fuse.regression.metrics import METRICS

    return [
        (
            metric.title,
            _cell(name, metric, result.vs_golden, report.golden_limits),
            _cell(name, metric, result.vs_unfused, report.unfused_limits),
        )
        for name, metric in METRICS.items()
    ]


def _cell(name: str, metric: Metric, comparison: Comparison | None, limits: Limits) -> _Cell:
    if comparison is None:
        return _Cell("-")
    value, bound = comparison.values[name], limits.bounds.get(name)
    if bound is None:
        return _Cell(metric.text(value))
    holds = value is None or (value >= bound if metric.higher_is_nearer else value <= bound)
    return _Cell(metric.text(value), f"{'≥' if metric.higher_is_nearer else '≤'} {metric.bound_text(bound)}", holds)


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_fuse.regression"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": _data_uri, "decibels": decibels}
    return environment
