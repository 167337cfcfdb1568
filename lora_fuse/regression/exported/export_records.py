"""Judged exports in a `metrics.json`: flat keys, and the verdicts worked out again from them, for the gate.

``exports.FORMAT.verdict``, ``.sha256`` of the file that was judged, figures of its weights, and for every case
``exports.FORMAT.CASE.psnr_db`` and so on, against the merged picture. Without exports there is no such key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import TypeAlias

from lora_fuse.errors import BadSource, Rerun
from lora_fuse.exports import FORMATS
from lora_fuse.pictures import metrics, picture
from lora_fuse.recipe import Artifacts, Recipe, records
from lora_fuse.regression import recorded_numbers, verdicts
from lora_fuse.regression.exported.export_verdicts import (
    ExportedCase,
    JudgedExport,
    Measures,
    WeightFigures,
    limits_of,
    verdict_of,
)

Scalar: TypeAlias = float | int | bool | str | None
PREFIX = "exports."
AGAIN = Rerun("regress", force=True)


def flat_exports(judged: Iterable[JudgedExport]) -> dict[str, Scalar]:
    """The keys of `metrics.json` for exports; NaN and infinity are null."""
    flat: dict[str, Scalar] = {}
    for export in judged:
        start = f"{PREFIX}{export.format}."
        said = {
            "verdict": export.verdict.value,
            "reasons": " ".join(export.reasons),
            "problems": " ".join(export.measures.problems),
            "file": export.file,
            "sha256": export.record.sha256,
            "bytes": export.record.size,
            **{name: _json(value) for name, value in asdict(export.measures.weights).items()},
        }
        flat |= {start + name: value for name, value in said.items()}
        for name, case in export.measures.cases.items():
            flat |= {f"{start}{name}.{key}": value for key, value in _flat_case(case).items()}
    return flat


def _flat_case(case: ExportedCase) -> dict[str, Scalar]:
    compared = case.vs_merged
    flat: dict[str, Scalar] = {
        "over_floor": _json(case.over_floor),
        "nonfinite": None if case.facts is None else case.facts.nonfinite,
    }
    flat |= {name: _json(None if compared is None else compared.values.get(name)) for name in metrics.METRICS}
    return flat | {"identical": compared is not None and compared.identical}


def _json(value: Scalar) -> Scalar:
    if not isinstance(value, float):
        return value
    return records.rounded(value) if math.isfinite(value) else None


def exports_of(at: Artifacts) -> records.Exports:
    """The list of a build's exports.

    Raises:
        BadSource: it is not there or no such list.
    """
    try:
        return records.read(records.Exports, at.exports)
    except FileNotFoundError as error:
        raise BadSource(f"{at.exports} is not there", rerun=Rerun("export", force=True)) from error


def places_of(recipe: Recipe) -> dict[str, str]:
    """The POSIX path of every format's file below the folder of exports; the recipe's formats are known ones."""
    return {name: FORMATS[name].place.format(recipe.name) for name in recipe.export.formats}


def check_exports(
    recipe: Recipe,
    at: Artifacts,
    numbers: recorded_numbers.RecordedNumbers,
    floors: Mapping[str, verdicts.Comparison | None],
) -> list[verdicts.Verdict]:
    """Judge every export again from its numbers, and refuse what is said of it if that does not follow.

    `floors` has the noise floor of every case.

    Returns:
        The verdicts, one a format.

    Raises:
        BadSource: a format was not judged, or another file of it than `export.json` lists, or what is said does not
            follow.
        BadConfig: a format has no limits.
    """
    found = {name.split(".")[1] for name in numbers.content if name.startswith(PREFIX)}
    if found != set(recipe.export.formats):
        raise BadSource(
            f"{numbers.path} judges the exports {', '.join(sorted(found)) or 'none'}, and export.formats asks for "
            f"{', '.join(recipe.export.formats) or 'none'}",
            rerun=AGAIN,
        )
    if not found:
        return []
    listed = exports_of(at).files
    places = places_of(recipe)
    verdicts_found = []
    for name, limits in limits_of(recipe).items():
        start = f"{PREFIX}{name}."
        place = places[name]
        if place not in listed:
            raise BadSource(f"{at.exports} has no {place}", rerun=Rerun("export", force=True))
        for key, follows in (("file", place), ("sha256", listed[place].sha256), ("bytes", listed[place].size)):
            numbers.check(start + key, follows)
        problems = numbers.text(f"{start}problems")
        cases = {case: _case(f"{start}{case}", name, case, numbers, at, floor) for case, floor in floors.items()}
        measures = Measures(_figures(start, numbers), cases, [problems] if problems else [])
        verdict, _ = verdict_of(measures, limits, recipe.regress.over_floor)
        numbers.check(f"{start}verdict", verdict.value)
        verdicts_found.append(verdict)
    return verdicts_found


def _figures(start: str, numbers: recorded_numbers.RecordedNumbers) -> WeightFigures:
    """The figures of weights as they are recorded: a pass over all of them is not made again."""
    found: dict[str, Scalar] = {}
    for one in fields(WeightFigures):
        key = start + one.name
        if one.name.endswith("_in"):
            found[one.name] = None if numbers.value(key) is None else numbers.text(key)
        else:
            found[one.name] = numbers.number(key)
    for name in ("changed", "nonfinite"):
        found[name] = int(numbers.number(start + name) or 0)
    return WeightFigures(**found)  # type: ignore[arg-type]


def _case(
    start: str,
    name: str,
    case: str,
    numbers: recorded_numbers.RecordedNumbers,
    at: Artifacts,
    floor: verdicts.Comparison | None,
) -> ExportedCase:
    """An export's case as it is recorded, the cheap numbers measured again from the pictures."""
    nonfinite = numbers.number(f"{start}.nonfinite")
    if nonfinite is None:  # it could not be rendered, which no limit lets pass
        return ExportedCase()
    levels = recorded_numbers.read_judged(at.images / f"{case}.{name}.png")
    merged = recorded_numbers.read_judged(at.images / f"{case}.merged.png")
    compared = numbers.comparison(start)
    numbers.measured_again(start, compared, levels, merged)
    facts = verdicts.Facts.of(picture.Picture(levels, int(nonfinite)))
    found = ExportedCase(facts, compared, floor)
    numbers.check(f"{start}.over_floor", found.over_floor)
    return found
