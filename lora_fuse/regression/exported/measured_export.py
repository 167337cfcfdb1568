"""A build's exports read back from their files, measured and judged.

What was meant is the exact sum of base and LoRAs, before any rounding; what a format keeps is the merged tensor itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lora_fuse.checkpoint import Checkpoint, open_checkpoint
from lora_fuse.errors import BadCheckpoint, BadSource, Rerun
from lora_fuse.exports import ExportOptions, QuantisedPart, problems, quantised_by, read_export
from lora_fuse.fusion import Plan, read_manifest
from lora_fuse.machine import FileRecord, file_state, files
from lora_fuse.pictures import pairs
from lora_fuse.recipe import Artifacts, Recipe
from lora_fuse.regression import case_judgement, verdicts
from lora_fuse.regression.exported.export_records import exports_of, places_of
from lora_fuse.regression.exported.export_verdicts import (
    ExportedCase,
    JudgedExport,
    Measures,
    WeightFigures,
    limits_of,
    verdict_of,
)
from lora_fuse.regression.exported.weight_noise import FloatArray, TensorNoise, WeightNoise, kept_noise, tensor_noise

WORKERS = min(4, os.cpu_count() or 1)  # matrices measured at once: six float32 copies of each, of the largest a GB
MOST = 3  # sentences on tensors
AGAIN = Rerun("export", force=True)


def decoders_of(recipe: Recipe, at: Artifacts) -> dict[str, pairs.Decoded]:
    """Readers of a build's exports for the renderer, by format; every file is the one that `export.json` lists.

    Raises:
        BadConfig: a format is unknown, or has no limits.
        BadSource: the list is not there or is of another merge, or a file is missing or another one.
    """
    if not recipe.export.formats:
        return {}
    limits_of(recipe)
    listed = exports_of(at)
    if listed.manifest_sha256 != read_manifest(at.manifest)[1]:
        raise BadSource(f"{at.exports} is of another merge than {at.manifest}", rerun=AGAIN)
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(at.merged).tensors().items()}
    found: dict[str, pairs.Decoded] = {}
    for name, place in places_of(recipe).items():
        check_file(at.exported / place, listed.files.get(place), str(at.exports))
        found[name] = partial(read_export, at.exported / place, shapes)
    return found


def check_file(path: Path, record: FileRecord | None, listed_by: str) -> None:
    """Refuse a file that is not the listed one.

    Raises:
        BadSource: it is not listed, cannot be read, or has another sha256.
    """
    try:
        found = files.hash_file(path)
    except OSError as error:
        raise BadSource(f"{path} cannot be read ({error.strerror})", rerun=AGAIN) from error
    if record is None or found != record:
        said = "nothing" if record is None else f"sha256 {record.sha256}"
        raise BadSource(f"{path} has sha256 {found.sha256}, and {listed_by} says {said}", rerun=AGAIN)


@dataclass(frozen=True, slots=True)
class Meant:
    """The weights of a merge as they were meant: of the plan's exact sums, the base, and the merged checkpoint."""

    checkpoint: Checkpoint
    targets: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    exact: Callable[[str], FloatArray]
    base: Callable[[str], FloatArray]
    merged: Callable[[str], FloatArray]

    @staticmethod
    def of(plan: Plan, merged: Path) -> Meant:
        """Read nothing yet; `merged` is the repository that the plan made."""
        from lora_fuse.fusion import exact_sums  # numba's import takes half a second

        checkpoint = open_checkpoint(merged)
        stored = Plan(checkpoint, (), (), {})
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors().items()}
        base = replace(plan, targets={})
        sums = [exact_sums(one).matrix for one in (plan, base, stored)]
        return Meant(checkpoint, frozenset(plan.targets), shapes, *sums)


def measure_weights(
    decoded: Iterable[tuple[str, FloatArray]], meant: Meant, quantised: QuantisedPart
) -> tuple[WeightNoise, list[str]]:
    """Measure every tensor of an export as it is read, several at once.

    Returns:
        The noise, and sentences on tensors that are missing, unknown or of another shape.

    Raises:
        BadCheckpoint: the export or the base cannot be read.
    """
    left = set(meant.shapes)
    wrong: list[str] = []

    def known() -> Iterator[tuple[int, Callable[[], TensorNoise]]]:
        for name, values in decoded:
            if name not in left:
                wrong.append(f"It has {name!r}, which is no weight of the model or comes twice.")
            elif values.shape != meant.shapes[name]:
                wrong.append(f"Its {name!r} is of shape {values.shape}, the model's of {meant.shapes[name]}.")
            else:
                yield 1, partial(_measure, name, values, meant, quantised)
            left.discard(name)

    with ThreadPoolExecutor(WORKERS, "weights") as threads:
        tensors = tuple(file_state.in_order(threads, known(), WORKERS + 1))
    if missing := sorted(name for name in left if 0 not in meant.shapes[name]):
        wrong.append(f"It lacks {len(missing)} weights, {missing[0]} for one.")
    return WeightNoise(tensors), wrong


def _measure(name: str, values: FloatArray, meant: Meant, quantised: QuantisedPart) -> TensorNoise:
    if name not in quantised.names:
        return kept_noise(name, values, meant.merged(name))
    exact = meant.exact(name)
    base = meant.base(name) if name in meant.targets else None
    best = quantised.at_best(name, exact) if quantised.at_best else None
    return tensor_noise(name, values, exact, base=base, best=best)


def judge_exports(
    recipe: Recipe,
    at: Artifacts,
    plan: Plan,
    cases: Sequence[case_judgement.JudgedPair],
    seconds: Mapping[str, Mapping[str, float]],
) -> list[JudgedExport]:
    """Measure and judge every export that a recipe asks for; `seconds` are of its pictures and loads, see `RunRecord`.

    Raises:
        BadConfig, BadSource: see `decoders_of`.
    """
    readers = decoders_of(recipe, at)
    if not readers:
        return []
    limits = limits_of(recipe)
    listed = exports_of(at).files
    places = places_of(recipe)
    meant = Meant.of(plan, at.merged)
    judged = []
    for name in readers:
        pictures = {case.name: _case(name, case) for case in cases}
        figures, wrong = figures_of(name, at.exported / places[name], meant, ExportOptions.of(recipe.export))
        measures = Measures(figures, pictures, wrong)
        verdict, reasons = verdict_of(measures, limits[name], recipe.regress.over_floor)
        load = seconds.get("loads", {}).get(f"export {name}", 0.0)
        took = {"load": load, **seconds.get(f"export {name}", {})}
        place = places[name]
        judged.append(JudgedExport(name, place, listed[place], measures, verdict, reasons, limits[name], took))
    return judged


def figures_of(name: str, path: Path, meant: Meant, options: ExportOptions) -> tuple[WeightFigures, list[str]]:
    """The figures of a file's weights, and sentences on what its readers would not take it for.

    `name` is of the format that it is said to be in, `options` are those that it was to be made with.
    """
    checkpoint = meant.checkpoint
    try:
        unread = problems(path, checkpoint.config)
        decoded = read_export(path, meant.shapes)
        weights, missing = measure_weights(decoded, meant, quantised_by(name, checkpoint, options))
    except BadCheckpoint as error:
        return WeightFigures(), [f"The file cannot be read: {error}."]
    said = [f"Its readers stumble: {unread[0]} ({len(unread)} in all)."] if unread else []
    return WeightFigures.of(weights), said + missing[:MOST]


def _case(name: str, case: case_judgement.JudgedPair) -> ExportedCase:
    picture = case.pair.exports.get(name)
    if picture is None:
        return ExportedCase()
    return ExportedCase(verdicts.Facts.of(picture), case.exports[name], case.result.floor)
