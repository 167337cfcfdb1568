"""The plan of a sweep: every point with its pins, and with all that its pictures depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_fuse.errors import LoraFuseError, Refused
from lora_fuse.hub import sizes as source_sizes
from lora_fuse.machine import files, progress
from lora_fuse.pictures import Case, environment, pairs
from lora_fuse.recipe import Lock, Recipe, checkout, paths
from lora_fuse.regression import goldens
from lora_fuse.studies.sweep.pins import SourceLocks, check_room
from lora_fuse.studies.sweep.points import POINTS, Point, clear_leftovers, folder_of, key_of, waiting

ENGINE = 1  # to be raised when the same inputs give other pictures or numbers
SCALE = "fuse.scale="


@dataclass(frozen=True, slots=True)
class SweptPoint:
    """One point of a sweep: the overrides that are its own (``fuse.scale=0.8``), and all of its parameters."""

    overrides: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class PlannedPoint:
    """A pinned point: its recipe, locks and the inputs of its key; `problem` is the reason if it cannot be built."""

    asked: SweptPoint
    point: Point
    base: Lock
    loras: Mapping[str, Lock]
    inputs: Mapping[str, Any]
    alone: Mapping[str, Any]
    problem: LoraFuseError | None = None

    @property
    def series(self) -> str:
        """Its overrides besides the scale."""
        return " ".join(override for override in self.asked.overrides if not override.startswith(SCALE))


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The points of a sweep, each once, and the room that they take.

    `missing` are still to be built; `merged` is the size of the largest merged checkpoint in bytes, and with `keep` all
    of them stay; `same` is how many points are another one again.
    """

    points: tuple[PlannedPoint, ...]
    missing: tuple[PlannedPoint, ...]
    merged: int
    same: int
    keep: bool

    def __str__(self) -> str:
        same = f" ({self.same} more are the same again)" if self.same else ""
        done = f"{len(self.points) - len(self.missing)} done already, {len(self.missing)} to build"
        room = f"; {progress.human_bytes(self.merged)} of disk for {'each' if self.keep else 'one at a time'}"
        return f"{len(self.points)} points{same}, {done}{room if self.missing else ''}"

    def number(self, point: Point) -> str:
        """The place of a point among all, ``2 of 5``."""
        return f"{[planned.point for planned in self.points].index(point) + 1} of {len(self.points)}"


def plan_sweep(swept: Sequence[SweptPoint], folder: Path, *, keep: bool) -> SweepPlan:
    """Check every point, see that there is room, then have all files on this machine, each fetched and hashed once.

    Raises:
        Refused: a case, the GPU or a base is not there; nothing was fetched.
        NoSpace: the disk has no room for base and merged checkpoint; nothing was fetched or written.
    """
    for point in swept:
        environment.check_gpu(point.recipe.regress.placement)
        pairs.check_cases(Case.of(point.recipe), pairs.Setup.of(point.recipe))
    with waiting(folder / "locks.json"):
        base, loras = paths.HERE.earlier_locks()  # the build's: a sweep keeps to its commits
        known = loras.values() if base is None else [base, *loras.values()]
        pins = SourceLocks(folder / "locks.json", known, swept[0].recipe.download)
        fetched, merged = _need(swept, pins)
        if fetched:
            check_room(fetched, merged, folder)
        every = [_pin(point, pins, folder / POINTS) for point in swept]
        pins.write()
    once = tuple({planned.point.key: planned for planned in reversed(every)}.values())[::-1]
    missing = tuple(planned for planned in once if not planned.point.is_done(keep=keep))
    check_room(0, merged * (len(missing) if keep else min(1, len(missing))), folder)
    clear_leftovers(folder / POINTS, [planned.point for planned in missing])
    return SweepPlan(once, missing, merged, len(every) - len(once), keep)


def _need(swept: Sequence[SweptPoint], pins: SourceLocks) -> tuple[int, int]:
    """Bytes to fetch for all points, and bytes of the largest merged checkpoint, before anything is fetched."""
    sizes: dict[object, source_sizes.SourceSize] = {}
    largest = 0
    for recipe in (point.recipe for point in swept):
        if recipe.base.place not in sizes:
            sizes[recipe.base.place] = pins.sizes(recipe.base)
        base = sizes[recipe.base.place]
        grown = (recipe.fuse.growth - 1) * base.fused(recipe.components)
        merged = base.total if recipe.fuse.untouched == "copy" else base.fused(recipe.components)
        largest = max(largest, grown + merged)
        for lora in recipe.loras.values():
            if (lora.place, lora.filename) not in sizes:
                with suppress(Refused):  # this point's own matter, said when it is pinned
                    sizes[lora.place, lora.filename] = pins.sizes(lora, lora.filename)
    return sum(size.to_fetch for size in sizes.values()), largest


def _pin(asked: SweptPoint, pins: SourceLocks, folder: Path) -> PlannedPoint:
    """Have the files of a point on this machine, and name its folder below `folder` after all that it depends on."""
    recipe = asked.recipe
    base = pins.base(recipe.base)
    loras: dict[str, Lock] = {}
    problem: Refused | None = None
    try:
        loras = {name: pins.lora(lora, lora.filename) for name, lora in sorted(recipe.loras.items())}
    except Refused as error:
        problem = error
    environment.make_deterministic(recipe.regress.threads)
    here = environment.environment(recipe.regress.placement, recipe.regress.dtype, compiled=recipe.regress.compile)
    alone = _inputs_alone(recipe, base, here)
    inputs = alone | _inputs_merged(recipe, loras, here)
    if problem is not None:
        inputs["loras"] = {name: lora.model_dump() for name, lora in recipe.loras.items()}
    key = key_of(inputs)
    point = Point(" ".join(asked.overrides), key, folder / folder_of(key))
    return PlannedPoint(asked, point, base, loras, inputs, alone, problem)


def _inputs_alone(recipe: Recipe, base: Lock, here: environment.Environment) -> dict[str, Any]:
    """Everything that the base's own pictures depend on."""
    regress = recipe.regress
    cases = {
        name: case.model_dump() | {"sha256": [files.hash_file(Path(image)).sha256 for image in case.images]}
        for name, case in regress.cases.items()
    }
    return {
        "engine": [ENGINE, checkout.this_version()],
        "base": _locked(base),
        "pipeline": recipe.base.pipeline,
        "condition_area": recipe.base.condition_area,
        "base_sampling": recipe.base.sampling.model_dump(),
        "cases": cases,
        "environment": json.loads(json.dumps(asdict(here))),
    }


def _inputs_merged(recipe: Recipe, loras: Mapping[str, Lock], here: environment.Environment) -> dict[str, Any]:
    """Everything that a point's pictures, and the verdicts on them, depend on besides."""
    regress = recipe.regress
    approved = goldens.Goldens(paths.GOLDEN / recipe.name).for_run(here.key, list(regress.cases))
    return {
        "recipe": recipe.name,
        "loras": {name: [recipe.fuse.scale_of(name), _locked(lock)] for name, lock in loras.items()},
        "scale": recipe.fuse.scale,
        "selection": recipe.fuse.model_dump(include={"only", "skip", "scales"}),
        "scheduler": recipe.scheduler_config,
        "sampling": recipe.sampling.model_dump(),
        "verify": recipe.verify.model_dump(),
        "limits": regress.model_dump(include={"unfused", "golden", "over_floor"}),
        "goldens": {name: [golden.record.sha256 for golden in kept] for name, kept in approved.items()},
    }


def _locked(lock: Lock) -> dict[str, Any]:
    files = {name: file.sha256 for name, file in lock.files.items()}
    component = {} if lock.component is None else {"component": lock.component}
    return {"from": lock.label, "files": files, **component}
