"""Judged exports for the report: a column each, and bytes against error. Nothing is decided here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_fuse.machine import progress
from lora_fuse.pictures import metrics
from lora_fuse.regression.exported.export_verdicts import ExportedCase, JudgedExport

# Figures of weights: name, title, format.
FIGURES = (
    ("relative_l2", "relative L2 of all weights", ".3g"),
    ("worst_l2", "of the worst matrix", ".3g"),
    ("from_best", "from what the format makes of the sum", ".3g"),
    ("noise", "noise / update energy", ".3g"),
    ("cosine", "LoRA left, cosine", ".4f"),
    ("kept", "LoRA left, share", ".4f"),
)
SHOWN = ("psnr_db", "mean_abs", "flip", "flip_worst", "comb_db")  # of pictures, beside the latents
PLOT = (520, 220)  # pixels
LABEL = (80, 12)  # pixels within which two labels would lie on each other
MARGIN = (64, 24, 16, 36)  # left, right, top, bottom


@dataclass(frozen=True, slots=True)
class Cell:
    """A measured value as text, its limit as text (empty without one), and whether it holds."""

    value: str
    limit: str = ""
    holds: bool = True


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One measure, a cell an export; `case` is empty for one of the whole file."""

    case: str
    title: str
    cells: tuple[Cell, ...]


def export_rows(exports: Sequence[JudgedExport]) -> list[ExportRow]:
    """The rows of the table of exports: size and time, weights, then every case."""
    if not exports:
        return []
    rows = [
        ExportRow("", "size", tuple(Cell(progress.human_bytes(export.record.size)) for export in exports)),
        ExportRow("", "read and decoded", tuple(_seconds(export, ["load"]) for export in exports)),
        ExportRow("", "a picture", tuple(_seconds(export, list(export.measures.cases)) for export in exports)),
    ]
    rows += [
        ExportRow("", title, tuple(_figure(export, name, digits) for export in exports))
        for name, title, digits in FIGURES
    ]
    for case in exports[0].measures.cases:
        cells = tuple(_over_floor(export, export.measures.cases[case]) for export in exports)
        rows.append(ExportRow(case, "latents over the floor", cells))
        rows += [
            ExportRow(case, metrics.METRICS[name].title, tuple(_metric(export, case, name) for export in exports))
            for name in SHOWN
        ]
    return rows


def _seconds(export: JudgedExport, names: Iterable[str]) -> Cell:
    found = [export.seconds[name] for name in names if name in export.seconds]
    return Cell(f"{sum(found) / len(found):.2f} s" if found else "-")


def _figure(export: JudgedExport, name: str, digits: str) -> Cell:
    value = getattr(export.measures.weights, name)
    bound = export.limits.get(name)
    text = "-" if value is None else f"{value:{digits}}"
    if bound is None:
        return Cell(text)
    if name == "kept":
        return Cell(text, f"1 ± {bound:g}", value is None or abs(value - 1) <= bound)
    return Cell(text, f"≤ {bound:g}", value is not None and value <= bound)


def _over_floor(export: JudgedExport, case: ExportedCase) -> Cell:
    over = case.over_floor
    bound = export.limits.get("over_floor")
    text = "-" if over is None else f"{over:.2f} x"
    return Cell(text) if bound is None else Cell(text, f"≤ {bound:g} x", over is not None and over <= bound)


def _metric(export: JudgedExport, case: str, name: str) -> Cell:
    compared = export.measures.cases[case].vs_merged
    metric = metrics.METRICS[name]
    if compared is None:
        return Cell("-")
    value = compared.values[name]
    bound = export.limits.get(name)
    if bound is None:
        return Cell(metric.text(value))
    sign = "≥" if metric.higher_is_nearer else "≤"
    return Cell(metric.text(value), f"{sign} {metric.bound_text(bound)}", metric.holds(value, bound))


@dataclass(frozen=True, slots=True)
class PlottedExport:
    """A point of the plot and its label, in pixels; `passed` is the verdict's, `up` is how far its label is moved."""

    x: float
    y: float
    label: str
    passed: bool
    up: float = 0.0


@dataclass(frozen=True, slots=True)
class TradeOff:
    """Bytes against error, for an SVG: points, and the ticks of both axes by their labels."""

    width: int
    height: int
    marks: tuple[PlottedExport, ...]
    across: tuple[PlottedExport, ...]
    up: tuple[PlottedExport, ...]


def trade_off(exports: Sequence[JudgedExport]) -> TradeOff | None:
    """Lay out size (from 0 on) against the relative L2 of all weights (logarithmic); None without two to compare.

    An export without any error is on the lowest line.
    """
    measured = [(export, export.measures.weights.relative_l2) for export in exports]
    points = [(export, error) for export, error in measured if error is not None and math.isfinite(error)]
    if len(points) < 2:
        return None
    width, height = PLOT
    left, right, top, bottom = MARGIN
    errors = [error for _, error in points if error > 0] or [1e-3]
    low = math.floor(math.log10(min(errors)))
    high = max(low + 1, math.ceil(math.log10(max(errors))))
    most = max(export.record.size for export, _ in points) * 1.15

    def across(size: float) -> float:
        return left + (width - left - right) * size / most

    def up(error: float) -> float:
        share = 0.0 if error <= 0 else (math.log10(error) - low) / (high - low)
        return height - bottom - (height - top - bottom) * share

    marks: list[PlottedExport] = []
    for export, error in sorted(points, key=lambda point: point[1]):
        x = across(export.record.size)
        y = up(error)
        near = sum(abs(mark.x - x) < LABEL[0] and abs(mark.y - y) < LABEL[1] for mark in marks)
        marks.append(PlottedExport(x, y, export.format, export.verdict.passed, 8 + near * LABEL[1]))
    sizes = tuple(
        PlottedExport(across(most * share), height - bottom, progress.human_bytes(int(most * share)), passed=True)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    lines = tuple(
        PlottedExport(left, up(10.0**power), f"{10.0**power:g}", passed=True) for power in range(low, high + 1)
    )
    return TradeOff(width, height, tuple(marks), sizes, lines)
