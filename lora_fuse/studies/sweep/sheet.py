"""The results of a sweep: a page to look at, a table for a review, and JSON for programs. Pure: no file is opened.

The page holds its pictures and curves and asks the network for nothing, as the report of a run does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_fuse.machine import text
from lora_fuse.pictures import encode, pages
from lora_fuse.studies.sweep.curves import Curve, curve
from lora_fuse.studies.sweep.numbers import NEARER, title_of
from lora_fuse.studies.sweep.recommendation import Recommendation

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Column:
    """A point as the sheet shows it: its numbers, or why it was refused.

    `pictures` are the merged ones by case; `damage` is what is wrong with them; `merged` the folder of a checkpoint
    that was kept.
    """

    label: str
    series: str
    scale: float
    key: str
    metrics: Mapping[str, Any] | None = None
    refused: str | None = None
    damage: tuple[str, ...] = ()
    pictures: Mapping[str, encode.Encoded] = field(default_factory=dict)
    merged: str | None = None


@dataclass(frozen=True, slots=True)
class CaseRow:
    """A case: what was asked for, its input pictures, and the base's own picture."""

    case: str
    prompt: str
    inputs: tuple[encode.Encoded, ...]
    alone: encode.Encoded | None


@dataclass(frozen=True, slots=True)
class Sheet:
    """A finished sweep.

    `command` starts it again; `alone` says how the base is run by itself, `run` how the points are; `curves` has a
    value for each column that was built, by key, see `lora_fuse.studies.sweep.numbers.curves`.
    """

    recipe: str
    command: str
    run: str
    alone: str
    environment: str
    recommendation: Recommendation
    columns: tuple[Column, ...]
    rows: tuple[CaseRow, ...]
    curves: Mapping[str, Sequence[float | None]]

    @property
    def built(self) -> list[Column]:
        """The columns that have numbers, in the order of the curves."""
        return [column for column in self.columns if column.metrics is not None]


def sheet_html(sheet: Sheet) -> str:
    """The page; its size is about 4/3 of its pictures'."""
    return pages.render_page(
        "lora_fuse.studies.sweep",
        "sweep.html.j2",
        filters={"short": _short},
        sheet=sheet,
        curves=drawings(sheet),
        text=_text,
    )


def drawings(sheet: Sheet) -> list[Curve]:
    """A curve for each metric, if there is more than one scale."""
    if len({column.scale for column in sheet.built}) < 2:
        return []
    found = []
    for key, values in sheet.curves.items():
        series: dict[str, list[tuple[float, float | None]]] = {}
        for column, value in zip(sheet.built, values, strict=True):
            series.setdefault(column.series, []).append((column.scale, value))
        one = curve(title_of(key), series, nearer=NEARER.get(key, ""), chosen=sheet.recommendation.scale)
        found += [one] if one is not None else []
    return found


def sheet_json(sheet: Sheet) -> str:
    """The numbers: every point with its key, scale and means, and the recommendation."""
    means: dict[str, dict[str, float | None]] = {column.key: {} for column in sheet.built}
    for key, values in sheet.curves.items():
        for column, value in zip(sheet.built, values, strict=True):
            means[column.key][key] = value
    points = [
        {
            "label": column.label,
            "scale": column.scale,
            "key": column.key,
            "refused": column.refused,
            "damage": list(column.damage),
            "verdict": None if column.metrics is None else column.metrics["verdict"],
            "mean": means.get(column.key, {}),
            "merged": column.merged,
        }
        for column in sheet.columns
    ]
    content = {"schema": SCHEMA, "recipe": sheet.recipe, "command": sheet.command, "environment": sheet.environment}
    content |= {"recommendation": {**asdict(sheet.recommendation), "reason": sheet.recommendation.reason}}
    return json.dumps(content | {"points": points}, indent=2, ensure_ascii=False) + "\n"


def sheet_markdown(sheet: Sheet) -> str:
    """The numbers as a table, and the recommendation."""
    shown = [
        key for key in ("baseline.latents_l2", "baseline.flip", "baseline.psnr_db", "over_floor") if key in sheet.curves
    ]
    heads = ["point", "to the golden", *map(title_of, shown)]
    best = text.markdown(sheet.recommendation.label or "none")
    lines = [f"## Sweep of {text.markdown(sheet.recipe)}", "", f"**Recommended: {best}.**"]
    lines += [*map(text.markdown, sheet.recommendation.reasons), ""]
    rows: list[list[object]] = [list(heads)]
    built = {column.key: at for at, column in enumerate(sheet.built)}
    for column in sheet.columns:
        chosen = column.label == sheet.recommendation.label
        name = text.Markdown(f"**{text.markdown(column.label.strip())}**") if chosen else column.label
        if column.metrics is None:
            rows.append([name, f"refused: {column.refused or ''}", *[""] * len(shown)])
            continue
        numbers = [_text(sheet.curves[key][built[column.key]]) for key in shown]
        rows.append([name, column.metrics["verdict"], *numbers])
    note = f"Means over {len(sheet.rows)} cases; {sheet.run}; the base alone: {sheet.alone}; {sheet.environment}."
    table = text.markdown_table(rows)
    return "\n".join([*lines, table, "", text.markdown(note), "", text.code(sheet.command), ""])


def _short(label: str) -> str:
    """A label without the folders of its keys, for a narrow column: ``scale=0.8 filename=v2.safetensors``."""
    return re.sub(r"(?<!\S)\+*[\w.]*\.(?=\w+=)", "", label)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
