"""Builds the points of a sweep by the stages' own functions, and puts its sheet together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_fuse.fusion import plan_of
from lora_fuse.machine import files, staging
from lora_fuse.pictures import Case, environment, pairs, picture
from lora_fuse.recipe import Artifacts, hf_cache, paths, sections
from lora_fuse.regression import case_judgement, goldens, judge
from lora_fuse.studies.sweep.baseline import baseline
from lora_fuse.studies.sweep.contact import Entry, Headings, make_sheet
from lora_fuse.studies.sweep.numbers import against_baseline, describe, failed
from lora_fuse.studies.sweep.planning import Plan, Planned
from lora_fuse.studies.sweep.points import IMAGES, METRICS, Point, key_of
from lora_fuse.studies.sweep.rendering import Renderer
from lora_fuse.studies.sweep.sheet import Sheet


@dataclass(slots=True)
class Builder:
    """Builds points below `folder` in this process; what they share is loaded, and the base rendered, once."""

    folder: Path
    keep: bool
    merge: paths.Merge
    _renderer: Renderer = field(default_factory=Renderer)
    _alone: dict[str, Mapping[str, picture.Picture]] = field(default_factory=dict)

    def alone(self, planned: Planned) -> Mapping[str, picture.Picture]:
        """The pictures of the base alone, by case."""
        params, key = planned.asked.params, key_of(planned.alone)
        if key not in self._alone:
            cases = Case.of(params)
            base = hf_cache.locate(planned.base)
            setup = pairs.Setup.of(params, baseline=True)
            make = lambda: self._renderer.alone(base, cases, setup)  # noqa: E731
            self._alone[key] = baseline(self.folder / "baseline" / key[:16], cases, make)
        return self._alone[key]

    def build(self, planned: Planned) -> str:
        """Fuse, verify, render and compare one point; returns what it came to, as a few words.

        Raises:
            Refused: it cannot be built.
        """
        if planned.problem is not None:
            raise planned.problem
        at = Artifacts(planned.point.folder)
        staging.remove(at.merged)
        try:
            said = self._build(planned, at)
        except BaseException:
            staging.remove(at.merged)
            raise
        if not self.keep:
            staging.remove(at.merged)
        return said

    def _build(self, planned: Planned, at: Artifacts) -> str:
        params = planned.asked.params
        plan, alone = plan_of(planned.base, planned.loras, params), self.alone(planned)
        self.merge(params, at, planned.base, planned.loras)
        environment.make_deterministic(params.regress.threads, on_gpu=params.regress.placement != "cpu")
        cases, setup = Case.of(params), pairs.Setup.of(params, baseline=False)
        here = environment.environment(setup.placement, setup.dtype)
        approved = goldens.Goldens.of(params, planned.base).for_run(here.key, [case.name for case in cases])
        rendered = self._renderer.sides(at.merged, plan, cases, setup)
        judged = judge(params, at, setup, here, rendered, approved)
        metrics = judged.metrics
        metrics["weights_passed"] = json.loads(at.verify.read_text(encoding="utf-8"))["passed"]
        for pair in rendered:
            metrics |= against_baseline(pair.case.name, pair.merged, alone[pair.case.name])
        case_judgement.save_pictures(judged.cases, planned.point.folder / IMAGES)
        files.replace_text(planned.point.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        return describe(metrics)


def sheet_of(plan: Plan, refused: Mapping[Point, str], builder: Builder, command: str) -> Sheet:
    """The sheet of a sweep whose points are all done or refused."""
    entries: list[Entry] = []
    cases: dict[str, Case] = {}
    alone: dict[str, picture.Picture] = {}
    done = [planned for planned in plan.points if planned.point not in refused]
    for planned in plan.points:
        params, point = planned.asked.params, planned.point
        steps = (params.sampling.steps, params.base.sampling.steps)
        facts = (point, planned.series, params.fuse.scale, *steps, len(params.loras))
        entries.append(Entry(*facts, refused=refused.get(point)))
        cases |= {case.name: case for case in Case.of(params)}
        alone |= builder.alone(planned) if planned in done else {}
    every = [planned.asked.params for planned in plan.points]
    headings = Headings(
        recipe=_either(params.name for params in every),
        command=command,
        run=_either(_sampling(params.sampling) for params in every),
        alone=_either(_sampling(params.base.sampling) for params in every),
        environment=_either(planned.point.metrics()["environment"] for planned in done),
    )
    return make_sheet(entries, cases.values(), alone, headings)


def wrong_points(sheet: Sheet) -> dict[str, str]:
    """Those that were refused, or are not base + LoRA, by label, and why."""
    found = {column.label: f"refused: {column.refused}" for column in sheet.columns if column.refused is not None}
    wrong = [column for column in sheet.built if column.metrics is not None and failed(column.metrics)]
    return found | {column.label: " ".join(column.damage) for column in wrong}


def _sampling(sampling: sections.SamplingParams) -> str:
    return f"{sampling.steps} steps, CFG {sampling.true_cfg_scale:g}"


def _either(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values))
