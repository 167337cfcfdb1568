"""Puts the sheet of a sweep together from the folders of its points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.machine import files, staging
from lora_fuse.pictures import Case, encode, picture, render
from lora_fuse.studies.sweep.numbers import broken, by_case, curves, distances, mean_of, worse_than_base
from lora_fuse.studies.sweep.points import IMAGES, MERGED, Point
from lora_fuse.studies.sweep.recommendation import (
    NEAREST_BY,
    Recommendation,
    Tried,
    largest_undamaged,
    nearest_to_teacher,
)
from lora_fuse.studies.sweep.sheet import Column, Row, Sheet, sheet_html, sheet_json, sheet_markdown

LARGEST = 384  # pixels of a side on the page; the files beside it are whole
QUALITY = 88


@dataclass(frozen=True, slots=True)
class Entry:
    """A point of the sweep with what the sheet needs to know of it; `refused` is why it could not be built."""

    point: Point
    series: str
    scale: float
    steps: int
    teacher_steps: int
    loras: int
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Headings:
    """What the sheet says of the sweep as a whole, see `Sheet`."""

    recipe: str
    command: str
    run: str
    alone: str
    environment: str


def make_sheet(
    entries: Sequence[Entry], cases: Iterable[Case], alone: Mapping[str, picture.Picture], headings: Headings
) -> Sheet:
    """The sheet of points that are done or refused.

    Args:
        entries: in the order to show them.
        cases: of any point.
        alone: the base's own pictures, by case.
        headings: of the sweep.
    """
    distilled = bool(entries) and all(entry.steps < entry.teacher_steps for entry in entries)
    columns = [_column(entry, distilled=distilled) for entry in entries]
    built = [column.metrics for column in columns if column.metrics is not None]
    rows = [
        Row(
            case.name,
            case.prompt,
            tuple(_encoded(render.open_picture(path, case)) for path in case.images),
            _encoded(alone[case.name]) if case.name in alone else None,
        )
        for case in cases
    ]
    best = _recommended(entries, columns, distilled=distilled)
    texts = (headings.recipe, headings.command, headings.run, headings.alone, headings.environment)
    return Sheet(*texts, best, tuple(columns), tuple(rows), curves(built))


def write_sheet(sheet: Sheet, folder: Path) -> None:
    """Write `sweep.html`, `sweep.json` and `sweep.md`.

    Raises:
        Busy: another process is writing the same.
    """
    with staging.exclusive(folder / "sweep.html"):
        for name, text in (("html", sheet_html), ("json", sheet_json), ("md", sheet_markdown)):
            files.replace_text(folder / f"sweep.{name}", text(sheet))


def _column(entry: Entry, *, distilled: bool) -> Column:
    point = entry.point
    facts = (point.label, entry.series, entry.scale, point.key)
    if entry.refused is not None:
        return Column(*facts, refused=entry.refused)
    numbers = point.metrics()
    pictures = {}
    for path in sorted((point.folder / IMAGES).glob("*.merged.png")):
        merged_picture = picture.Picture(picture.read_levels(path))
        pictures[path.name.removesuffix(".merged.png")] = _encoded(merged_picture)
    damage = broken(numbers) + (() if distilled else worse_than_base(numbers))
    merged = point.folder / MERGED
    kept = str(merged) if merged.is_dir() else None
    return Column(*facts, metrics=numbers, damage=damage, pictures=pictures, merged=kept)


def _recommended(entries: Sequence[Entry], columns: Sequence[Column], *, distilled: bool) -> Recommendation:
    tried = [
        Tried(
            column.label,
            column.series,
            column.scale,
            distances(column.metrics),
            by_case(column.metrics, f"baseline.{NEAREST_BY}"),
            mean_of(column.metrics, "floor.latents_l2") or 0.0,
            column.damage,
        )
        for column in columns
        if column.metrics is not None
    ]
    first = entries[0]
    if not distilled:
        return largest_undamaged(tried, steps=first.steps)
    loras = max(entry.loras for entry in entries)
    return nearest_to_teacher(tried, steps=first.steps, teacher_steps=first.teacher_steps, loras=loras)


def _encoded(shown: picture.Picture) -> encode.Encoded:
    """Shrink a large picture, so that a sheet of many stays one that can be sent."""
    return encode.encoded(shown, large=LARGEST, side=LARGEST, quality=QUALITY)
