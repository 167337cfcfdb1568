"""What a sweep's points are made of, in terms of the stages: what is pinned, what they depend on, how one is built."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_fuse import hub
from lora_fuse.errors import LoraFuseError, Refused
from lora_fuse.files import hash_file, replace_text
from lora_fuse.manifest import read_manifest
from lora_fuse.progress import human_bytes
from lora_fuse.records import SCHEMA, BaseLock, Lock, LoraLock, to_json
from lora_fuse.regression.candidates import candidates
from lora_fuse.regression.environment import check_gpu, environment, make_deterministic
from lora_fuse.regression.goldens import Goldens
from lora_fuse.regression.pairs import check_cases, judge_pairs, picture_of, save_pictures
from lora_fuse.regression.render import Case
from lora_fuse.regression.review import run_metrics
from lora_fuse.regression.verdicts import Picture
from lora_fuse.sweeping.baseline import baseline
from lora_fuse.sweeping.contact import Entry, Headings, make_sheet
from lora_fuse.sweeping.numbers import against_baseline, describe, failed
from lora_fuse.sweeping.pins import Pins, check_room
from lora_fuse.sweeping.points import IMAGES, METRICS, Point, clear_leftovers, key_of, waiting
from lora_fuse.sweeping.rendering import Renderer
from lora_fuse.sweeping.sheet import Sheet
from lora_fuse.workplace import remove
from stages.artifacts import GOLDEN, HERE, Artifacts
from stages.config import Variant
from stages.console import Console
from stages.fuse import fuse
from stages.params import Params, SamplingParams
from stages.planning import baseline_of, cases_of, plan_of, rules_of, setup_of
from stages.verify import verify

ENGINE = 1  # to be raised when the same inputs give other pictures or numbers
SCALE = "fuse.scale="
QUIET = Console(quiet=True)


@dataclass(frozen=True, slots=True)
class Planned:
    """A point that is pinned: its parameters, its locks, what its key is of; `problem` is why it cannot be built."""

    variant: Variant
    point: Point
    base: Lock
    loras: Mapping[str, Lock]
    inputs: Mapping[str, Any]
    alone: Mapping[str, Any]
    problem: LoraFuseError | None = None

    @property
    def series(self) -> str:
        """What it has besides its scale."""
        return " ".join(one for one in self.variant.overrides if not one.startswith(SCALE))


@dataclass(frozen=True, slots=True)
class Plan:
    """The points of a sweep, each once, and what they take.

    `missing` are still to be built; `merged` is the size of the largest merged checkpoint in bytes, and all of them stay
    with `keep`; `same` is how many points are another one again.
    """

    points: tuple[Planned, ...]
    missing: tuple[Planned, ...]
    merged: int
    same: int
    keep: bool

    def __str__(self) -> str:
        count, missing = len(self.points), len(self.missing)
        same = f" ({self.same} more are the same again)" if self.same else ""
        room = f"; {human_bytes(self.merged)} of disk for {'each' if self.keep else 'one at a time'}" if missing else ""
        return f"{count} points{same}, {count - missing} done already, {missing} to build{room}"

    def number(self, point: Point) -> str:
        """Which point that is, ``2 of 5``."""
        return f"{[one.point for one in self.points].index(point) + 1} of {len(self.points)}"


def plan_sweep(variants: Sequence[Variant], folder: Path, *, keep: bool) -> Plan:
    """Check every point, see that there is room, then have all files on this machine, each fetched and hashed once.

    Raises:
        Refused: a case, the GPU or a base is not there; nothing was fetched.
        NoSpace: the disk has no room for base and merged checkpoint; nothing was fetched or written.
    """
    for variant in variants:
        check_gpu(variant.params.regress.placement)
        check_cases(cases_of(variant.params), setup_of(variant.params))
    with waiting(folder / "locks.json"):
        pins = Pins(folder / "locks.json", _known_locks(), variants[0].params.download.transfer)
        fetched, merged = _need(variants, pins)
        if fetched:
            check_room(fetched, merged, folder)
        every = [_pin(variant, pins, folder / "points") for variant in variants]
        pins.write()
    once = tuple({planned.point.key: planned for planned in reversed(every)}.values())[::-1]
    missing = tuple(planned for planned in once if not planned.point.is_done(keep=keep))
    check_room(0, merged * (len(missing) if keep else min(1, len(missing))), folder)
    clear_leftovers(folder / "points", [planned.point for planned in missing])
    return Plan(once, missing, merged, len(every) - len(once), keep)


def _known_locks() -> list[Lock]:
    """What the build has pinned: a sweep keeps to its commits."""
    if not (HERE.base_lock.exists() and HERE.lora_lock.exists()):
        return []
    base, loras = HERE.read_locks()
    return [base, *loras.values()]


def _need(variants: Sequence[Variant], pins: Pins) -> tuple[int, int]:
    """Bytes to fetch for all points, and bytes of the largest merged checkpoint, before anything is fetched.

    Raises:
        BadSource: a base is not there.
    """
    sizes: dict[object, hub.Sizes] = {}
    largest = 0
    for variant in variants:
        params = variant.params
        base = sizes.setdefault(params.base.source, pins.sizes(params.base.source))
        copied = params.fuse.untouched == "copy"
        largest = max(largest, base.total if copied else base.below("transformer"))
        for lora in params.loras.values():
            try:
                sizes.setdefault((lora.source, lora.filename), pins.sizes(lora.source, lora.filename))
            except Refused:  # this point's own matter, said when it is pinned
                continue
    return sum(one.to_fetch for one in sizes.values()), largest


def _pin(variant: Variant, pins: Pins, folder: Path) -> Planned:
    """Have the files of a point on this machine, and name its folder below `folder` after all that it depends on."""
    params = variant.params
    base, loras, problem = pins.base(params.base.source), {}, None
    try:
        loras = {name: pins.lora(lora.source, lora.filename) for name, lora in sorted(params.loras.items())}
    except Refused as error:
        problem = error
    make_deterministic(params.regress.threads, on_gpu=params.regress.placement != "cpu")
    alone = _inputs_alone(params, base)
    inputs = alone | _inputs_merged(params, loras)
    if problem is not None:
        inputs["loras"] = {name: lora.model_dump() for name, lora in params.loras.items()}
    key = key_of(inputs)
    point = Point(" ".join(variant.overrides), key, folder / key[:16])
    return Planned(variant, point, base, loras, inputs, alone, problem)


def _inputs_alone(params: Params, base: Lock) -> dict[str, Any]:
    """What the base's own pictures depend on."""
    regress = params.regress
    cases = {
        name: case.model_dump() | {"sha256": [hash_file(Path(image)).sha256 for image in case.images]}
        for name, case in regress.cases.items()
    }
    return {
        "engine": [ENGINE, version("lora-fuse")],
        "base": _locked(base),
        "pipeline": params.base.pipeline,
        "condition_area": params.base.condition_area,
        "base_sampling": params.base.sampling.model_dump(),
        "cases": cases,
        "environment": json.loads(json.dumps(asdict(environment(regress.placement, regress.dtype)))),
    }


def _inputs_merged(params: Params, loras: Mapping[str, Lock]) -> dict[str, Any]:
    """What a point's pictures, and the verdicts on them, depend on besides."""
    regress = params.regress
    here = environment(regress.placement, regress.dtype)
    approved = Goldens(GOLDEN / params.name).for_run(here.key, list(regress.cases))
    return {
        "recipe": params.name,
        "loras": {name: [params.fuse.scale_of(name), _locked(lock)] for name, lock in loras.items()},
        "scale": params.fuse.scale,
        "selection": params.fuse.model_dump(include={"only", "skip", "scales"}),
        "scheduler": params.scheduler_config,
        "sampling": params.sampling.model_dump(),
        "verify": params.verify.model_dump(),
        "limits": regress.model_dump(include={"unfused", "golden", "over_floor"}),
        "goldens": {name: [one.record.sha256 for one in found] for name, found in approved.items()},
    }


def _locked(lock: Lock) -> dict[str, Any]:
    return {"from": lock.label, "files": {name: file.sha256 for name, file in lock.files.items()}}


@dataclass(slots=True)
class Builder:
    """Builds points below `folder` in this process; what they share is loaded, and the base rendered, once."""

    folder: Path
    keep: bool
    _renderer: Renderer = field(default_factory=Renderer)
    _alone: dict[str, Mapping[str, Picture]] = field(default_factory=dict)

    def alone(self, planned: Planned) -> Mapping[str, Picture]:
        """The pictures of the base alone, by case."""
        params, key = planned.variant.params, key_of(planned.alone)
        if key not in self._alone:
            cases, base = cases_of(params), hub.locate(planned.base)
            setup, sampling = setup_of(params), baseline_of(params)
            make = lambda: self._renderer.alone(base, cases, setup, sampling)  # noqa: E731
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
        remove(at.merged)
        try:
            said = self._build(planned, at)
        except BaseException:
            remove(at.merged)
            raise
        if not self.keep:
            remove(at.merged)
        return said

    def _build(self, planned: Planned, at: Artifacts) -> str:
        params = planned.variant.params
        plan, alone = plan_of(planned.base, planned.loras, params), self.alone(planned)
        replace_text(at.base_lock, to_json(BaseLock(SCHEMA, planned.base)))
        replace_text(at.lora_lock, to_json(LoraLock(SCHEMA, dict(planned.loras))))
        fuse(params, at, QUIET)
        verify(params, at, QUIET)
        make_deterministic(params.regress.threads, on_gpu=params.regress.placement != "cpu")
        cases, setup = cases_of(params), replace(setup_of(params), baseline=None)
        here = environment(setup.placement, setup.dtype)
        approved = Goldens(GOLDEN / params.name).for_run(here.key, [case.name for case in cases])
        pairs = self._renderer.pairs(at.merged, plan, cases, setup)
        judged = judge_pairs(
            pairs, {name: [one.golden for one in found] for name, found in approved.items()}, rules_of(params)
        )
        found = candidates(judged, *read_manifest(at.manifest), setup, here)
        metrics = run_metrics(judged, found, params.fuse.scale)
        metrics["weights_passed"] = json.loads(at.verify.read_text(encoding="utf-8"))["passed"]
        for pair in pairs:
            metrics |= against_baseline(pair.case.name, picture_of(pair.merged), alone[pair.case.name])
        save_pictures(judged, planned.point.folder / IMAGES)
        replace_text(planned.point.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        return describe(metrics)


def sheet_of(plan: Plan, refused: Mapping[Point, str], builder: Builder, command: str) -> Sheet:
    """The sheet of a sweep whose points are all done or refused."""
    entries: list[Entry] = []
    cases: dict[str, Case] = {}
    alone: dict[str, Picture] = {}
    done = [planned for planned in plan.points if planned.point not in refused]
    for planned in plan.points:
        params, point = planned.variant.params, planned.point
        steps = (params.sampling.steps, params.base.sampling.steps)
        facts = (point, planned.series, params.fuse.scale, *steps, len(params.loras))
        entries.append(Entry(*facts, refused=refused.get(point)))
        cases |= {case.name: case for case in cases_of(params)}
        alone |= builder.alone(planned) if planned in done else {}
    every = [planned.variant.params for planned in plan.points]
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


def _sampling(sampling: SamplingParams) -> str:
    return f"{sampling.steps} steps, CFG {sampling.true_cfg_scale:g}"


def _either(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values))
