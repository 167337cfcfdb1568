"""A metric over scale as a small SVG's coordinates. Pure: numbers in, numbers and labels out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH = 320  # of the drawing, in its own units
HEIGHT = 190
LEFT = 52  # margins
RIGHT = 12
TOP = 12
BOTTOM = 26
INSET = 10  # between the axis and the first mark
APART = 26  # between two labels of an axis, at least


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a line, and the label that it shows when it is pointed at."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Line:
    """The marks of one series; `pieces` are the runs of marks that a line joins, ``x,y x,y …``."""

    series: str
    marks: tuple[Mark, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric: its lines, the labels of both axes with their places, and the x of the recommended scale."""

    title: str
    nearer: str
    lines: tuple[Line, ...]
    x_labels: tuple[tuple[float, str], ...]
    y_labels: tuple[tuple[float, str], ...]
    chosen: float | None


def curve(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    nearer: str = "",
    chosen: float | None = None,
) -> Curve | None:
    """The drawing of a metric; None if it has no value.

    `series` has (scale, value) by name, in any order, where a value of None is a gap; `nearer` says in words which
    direction is nearer.
    """
    values = [value for points in series.values() for _, value in points if value is not None]
    if not values:
        return None
    scales = sorted({scale for points in series.values() for scale, _ in points})
    lowest = min(values)
    highest = max(values)
    pad = (highest - lowest) * 0.08 or abs(highest) * 0.05 or 1.0
    low = lowest - pad
    high = highest + pad

    def at_x(scale: float) -> float:
        share = (scale - scales[0]) / (scales[-1] - scales[0]) if len(scales) > 1 else 0.5
        return round(LEFT + INSET + share * (WIDTH - LEFT - INSET - RIGHT), 2)

    def at_y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 2)

    lines = tuple(_line(name, sorted(points), at_x, at_y) for name, points in series.items())
    ticks = (lowest, highest) if lowest < highest else (lowest,)
    return Curve(
        title,
        nearer,
        lines,
        _apart([(at_x(scale), f"{scale:g}") for scale in scales]),
        tuple((at_y(value), f"{value:.{3 if abs(value) >= 0.01 else 1}g}") for value in ticks),
        at_x(chosen) if chosen in scales and chosen is not None else None,
    )


def _apart(labels: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """The labels that do not overlap: the last, and from the first on whatever has room before it."""
    kept = [labels[0]]
    for label in labels[1:-1]:
        if label[0] - kept[-1][0] >= APART and labels[-1][0] - label[0] >= APART:
            kept.append(label)
    return (*kept, *(labels[1:] and [labels[-1]]))


def _line(
    series: str,
    points: Sequence[tuple[float, float | None]],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
) -> Line:
    marks: list[Mark] = []
    pieces: list[list[str]] = [[]]
    for scale, value in points:
        if value is None:
            pieces.append([])
            continue
        mark = Mark(at_x(scale), at_y(value), f"{series + ', ' if series else ''}scale {scale:g}: {value:.4g}")
        marks.append(mark)
        pieces[-1].append(f"{mark.x},{mark.y}")
    return Line(series, tuple(marks), tuple(" ".join(piece) for piece in pieces if len(piece) > 1))
