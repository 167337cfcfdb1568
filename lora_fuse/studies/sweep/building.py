"""Builds the points of a sweep by the stages' own functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lora_fuse.errors import BadSource
from lora_fuse.fusion import plan_of
from lora_fuse.machine import FileRecord, files, staging
from lora_fuse.pictures import Case, environment, pairs, picture
from lora_fuse.recipe import Artifacts, Lock, hf_cache, paths, records
from lora_fuse.regression import candidates, case_judgement, goldens, judge
from lora_fuse.studies.sweep.numbers import against_baseline, describe, failed
from lora_fuse.studies.sweep.planning import PlannedPoint
from lora_fuse.studies.sweep.points import BASELINES, IMAGES, METRICS, folder_of, key_of, waiting
from lora_fuse.studies.sweep.sheet import Sheet

BASELINE = "baseline.json"


@dataclass(slots=True)
class PointBuilder:
    """Builds points below `folder` in this process; what they share is loaded, and the base rendered, once.

    Text encoder, VAE, tokenizer and processor of a merged repository are the base's, byte for byte (`verify` holds it
    to that), so the base's are used for every point of one base, its cases and settings of the pipelines.
    """

    folder: Path
    keep: bool
    merge: paths.Merge
    _shared_by: tuple[object, ...] = ()
    _shared: pairs.Shared | None = None
    _alone: dict[str, Mapping[str, picture.Picture]] = field(default_factory=dict)

    def alone(self, planned: PlannedPoint) -> Mapping[str, picture.Picture]:
        """The pictures of the base alone, by case."""
        recipe = planned.asked.recipe
        key = key_of(planned.alone)
        if key not in self._alone:
            cases = Case.of(recipe)
            make = partial(self._render_alone, planned.base, cases, pairs.Setup.of(recipe, baseline=True))
            self._alone[key] = baseline(self.folder / BASELINES / folder_of(key), cases, make)
        return self._alone[key]

    @property
    def baselines(self) -> list[str]:
        """The folders below `BASELINES` of the pictures that were asked for."""
        return [folder_of(key) for key in self._alone]

    def _render_alone(self, lock: Lock, cases: Sequence[Case], setup: pairs.Setup) -> list[picture.Rendered]:
        """Render every case from the base, with its own scheduler and the settings of `setup.baseline`."""
        base = hf_cache.locate(lock)
        sides = pairs.BaseSides(base, cases, setup, self._share(base, cases, setup))
        rendered = sides.alone()
        sides.drop()
        return rendered

    def _share(self, base: Path, cases: Sequence[Case], setup: pairs.Setup) -> pairs.Shared:
        prompts = [side.beside_prompt for side in setup.sides]
        shared_by = (base, setup.pipeline, setup.dtype, setup.placement, *cases, *prompts)
        if self._shared is None or shared_by != self._shared_by:
            self._shared = None  # the memory of the last ones first
            self._shared = pairs.share(base, cases, setup)
            self._shared_by = shared_by
        return self._shared

    def build(self, planned: PlannedPoint) -> str:
        """Fuse, verify, render and compare one point, or raise its problem; return the result in a few words."""
        if planned.problem is not None:
            raise planned.problem
        at = Artifacts(planned.point.folder)
        staging.remove(at.merged)
        with ExitStack() as leftovers:
            leftovers.callback(staging.remove, at.merged)
            result = self._build(planned, at)
            if self.keep:
                leftovers.pop_all()
        return result

    def _build(self, planned: PlannedPoint, at: Artifacts) -> str:
        recipe = planned.asked.recipe
        plan = plan_of(planned.base, planned.loras, recipe)
        cases = Case.of(recipe)
        read = [planned.base, *planned.loras.values()], [image for case in cases for image in case.images]
        with paths.held(*read):
            alone = self.alone(planned)
        self.merge(recipe, at, planned.base, planned.loras)
        environment.make_deterministic(recipe.regress.threads)
        setup = pairs.Setup.of(recipe, baseline=False)
        here = environment.environment(setup.placement, setup.dtype, compiled=setup.compiled)
        approved = goldens.Goldens.of(recipe, planned.base).for_run(here.key, [case.name for case in cases])
        shared = self._share(plan.checkpoint.root, cases, pairs.Setup.of(recipe, baseline=True))
        with paths.held(*read), case_judgement.Comparisons(approved) as compared:
            rendered = pairs.render_pairs(at.merged, plan, cases, setup, shared=shared)
            judged = judge(recipe, at, setup, here, rendered, compared)
        metrics = judged.metrics
        metrics["weights_passed"] = paths.read_object(at.verify, "verify")["passed"]
        for pair in rendered:
            metrics |= against_baseline(pair.case.name, pair.merged, alone[pair.case.name])
        with staging.whole(planned.point.folder / IMAGES) as images:
            candidates.save_pictures(judged.cases, images)
        files.replace_text(planned.point.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        return describe(metrics)


def baseline(
    folder: Path, cases: Sequence[Case], render: Callable[[], Sequence[picture.Rendered]]
) -> Mapping[str, picture.Picture]:
    """The pictures in `folder`, by case; rendered if they are not there or not as they were."""
    with waiting(folder):  # several processes need the same, and one makes it
        if (kept := _read_baseline(folder, cases)) is not None:
            return kept
        pictures = dict(zip((case.name for case in cases), render(), strict=True))
        _write_baseline(folder, pictures)
        return pictures


def _read_baseline(folder: Path, cases: Sequence[Case]) -> dict[str, picture.Picture] | None:
    path = folder / BASELINE
    try:
        written = records.read(dict[str, FileRecord], path)
        if any(files.hash_file(folder / name) != record for name, record in written.items()):
            return None
        return {case.name: _read_picture(folder, case.name) for case in cases}
    except (OSError, BadSource):
        return None


def _read_picture(folder: Path, case: str) -> picture.Picture:
    with np.load(folder / f"{case}.npz") as arrays:
        latents = arrays["latents"]
        nonfinite = int(arrays["nonfinite"])
        sigmas = tuple(arrays["sigmas"].tolist())
    return picture.Picture(picture.read_levels(folder / f"{case}.png"), nonfinite, latents, sigmas)


def _write_baseline(folder: Path, pictures: Mapping[str, picture.Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case, made in pictures.items():
        files.replace_bytes(folder / f"{case}.png", made.png)
        np.savez(
            folder / f"{case}.npz",
            latents=np.asarray(made.latents),
            nonfinite=made.nonfinite,
            sigmas=np.asarray(made.sigmas),
        )
    names = [f"{case}.{kind}" for case in pictures for kind in ("npz", "png")]
    files.replace_text(folder / BASELINE, records.to_json({name: files.hash_file(folder / name) for name in names}))


def wrong_points(sheet: Sheet) -> dict[str, str]:
    """The reason, by label, of every point that was refused or is not base + LoRA."""
    refused = {column.label: f"refused: {column.refused}" for column in sheet.columns if column.refused is not None}
    wrong = [column for column in sheet.built if column.metrics is not None and failed(column.metrics)]
    return refused | {column.label: " ".join(column.damage) for column in wrong}
