"""Puts the sheet of a sweep together from the folders of its points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_fuse.machine import files, staging
from lora_fuse.pictures import Case, encode, pairs, picture
from lora_fuse.recipe import Recipe, sections
from lora_fuse.studies.sweep.building import PointBuilder
from lora_fuse.studies.sweep.numbers import broken, by_case, curves, distances, mean_of, worse_than_base
from lora_fuse.studies.sweep.planning import PlannedPoint, SweepPlan
from lora_fuse.studies.sweep.points import IMAGES, MERGED, Point
from lora_fuse.studies.sweep.recommendation import (
    NEAREST_BY,
    Recommendation,
    Tried,
    largest_undamaged,
    nearest_to_teacher,
)
from lora_fuse.studies.sweep.sheet import CaseRow, Column, Sheet, sheet_html, sheet_json, sheet_markdown

LARGEST = 384  # pixels of a side on the page; the files beside it are whole
QUALITY = 88


def sheet_of(plan: SweepPlan, refused: Mapping[Point, str], builder: PointBuilder, command: str) -> Sheet:
    """The sheet of a sweep whose points are all done, or `refused` for a reason; `command` starts the sweep again."""
    recipes = [planned.asked.recipe for planned in plan.points]
    done = [planned for planned in plan.points if planned.point not in refused]
    distilled = all(recipe.sampling.steps < recipe.base.sampling.steps for recipe in recipes)
    columns = tuple(_column(planned, refused.get(planned.point), distilled=distilled) for planned in plan.points)
    cases = {case.name: case for recipe in recipes for case in Case.of(recipe)}
    alone = {name: shown for planned in done for name, shown in builder.alone(planned).items()}
    return Sheet(
        recipe=_either(recipe.name for recipe in recipes),
        command=command,
        run=_either(_sampling(recipe.sampling) for recipe in recipes),
        alone=_either(_sampling(recipe.base.sampling) for recipe in recipes),
        environment=_either(planned.point.metrics()["environment"] for planned in done),
        recommendation=_recommended(recipes, columns, distilled=distilled),
        columns=columns,
        rows=tuple(_row(case, alone.get(name)) for name, case in cases.items()),
        curves=curves([column.metrics for column in columns if column.metrics is not None]),
    )


def _sampling(sampling: sections.SamplingParams) -> str:
    return f"{sampling.steps} steps, CFG {sampling.true_cfg_scale:g}"


def _either(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values))


def _row(case: Case, alone: picture.Picture | None) -> CaseRow:
    inputs = tuple(_encoded(pairs.open_picture(path, case)) for path in case.images)
    return CaseRow(case.name, case.prompt, inputs, None if alone is None else _encoded(alone))


def write_sheet(sheet: Sheet, folder: Path) -> None:
    """Write `sweep.html`, `sweep.json` and `sweep.md`.

    Raises:
        Busy: another process is writing the same.
    """
    kinds = {"html": sheet_html, "json": sheet_json, "md": sheet_markdown}
    texts = {folder / f"sweep.{kind}": text(sheet) for kind, text in kinds.items()}
    with staging.exclusive(folder / "sweep.html"), files.prepared(texts) as put:
        put()


def _column(planned: PlannedPoint, refused: str | None, *, distilled: bool) -> Column:
    point = planned.point
    facts = (point.label, planned.series, planned.asked.recipe.fuse.scale, point.key)
    if refused is not None:
        return Column(*facts, refused=refused)
    numbers = point.metrics()
    pictures = {}
    for path in sorted((point.folder / IMAGES).glob("*.merged.png")):
        merged_picture = picture.Picture(picture.read_levels(path))
        pictures[path.name.removesuffix(".merged.png")] = _encoded(merged_picture)
    damage = broken(numbers) + (() if distilled else worse_than_base(numbers))
    merged = point.folder / MERGED
    kept = str(merged) if merged.is_dir() else None
    return Column(*facts, metrics=numbers, damage=damage, pictures=pictures, merged=kept)


def _recommended(recipes: Sequence[Recipe], columns: Sequence[Column], *, distilled: bool) -> Recommendation:
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
    steps = recipes[0].sampling.steps
    if not distilled:
        return largest_undamaged(tried, steps=steps)
    loras = max(len(recipe.loras) for recipe in recipes)
    return nearest_to_teacher(tried, steps=steps, teacher_steps=recipes[0].base.sampling.steps, loras=loras)


def _encoded(shown: picture.Picture) -> encode.Encoded:
    """Shrink a large picture, so that a sheet of many stays one that can be sent."""
    return encode.encoded(shown, large=LARGEST, side=LARGEST, quality=QUALITY)
