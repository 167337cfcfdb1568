"""The points of a sweep in terms of the stages: what is pinned for them, and all that their pictures depend on."""

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
from lora_fuse.models import COMPONENT
from lora_fuse.pictures import Case, environment, pairs
from lora_fuse.recipe import Lock, Recipe, checkout, paths
from lora_fuse.regression import goldens
from lora_fuse.studies.sweep.pins import SourceLocks, check_room
from lora_fuse.studies.sweep.points import Point, clear_leftovers, key_of, waiting

ENGINE = 1  # to be raised when the same inputs give other pictures or numbers
SCALE = "fuse.scale="


@dataclass(frozen=True, slots=True)
class SweptParams:
    """One point of a sweep: the overrides that are its own (``fuse.scale=0.8``), and all of its parameters."""

    overrides: tuple[str, ...]
    params: Recipe


@dataclass(frozen=True, slots=True)
class Planned:
    """A point that is pinned: its parameters, its locks, what its key is of; `problem` is why it cannot be built."""

    asked: SweptParams
    point: Point
    base: Lock
    loras: Mapping[str, Lock]
    inputs: Mapping[str, Any]
    alone: Mapping[str, Any]
    problem: LoraFuseError | None = None

    @property
    def series(self) -> str:
        """What it has besides its scale."""
        return " ".join(one for one in self.asked.overrides if not one.startswith(SCALE))


@dataclass(frozen=True, slots=True)
class Plan:
    """The points of a sweep, each once, and what they take.

    `missing` are still to be built; `merged` is the size of the largest merged checkpoint in bytes, and with `keep` all
    of them stay; `same` is how many points are another one again.
    """

    points: tuple[Planned, ...]
    missing: tuple[Planned, ...]
    merged: int
    same: int
    keep: bool

    def __str__(self) -> str:
        count, missing = len(self.points), len(self.missing)
        same = f" ({self.same} more are the same again)" if self.same else ""
        room = (
            f"; {progress.human_bytes(self.merged)} of disk for {'each' if self.keep else 'one at a time'}"
            if missing
            else ""
        )
        return f"{count} points{same}, {count - missing} done already, {missing} to build{room}"

    def number(self, point: Point) -> str:
        """Which point that is, ``2 of 5``."""
        return f"{[one.point for one in self.points].index(point) + 1} of {len(self.points)}"


def plan_sweep(swept: Sequence[SweptParams], folder: Path, *, keep: bool) -> Plan:
    """Check every point, see that there is room, then have all files on this machine, each fetched and hashed once.

    Raises:
        Refused: a case, the GPU or a base is not there; nothing was fetched.
        NoSpace: the disk has no room for base and merged checkpoint; nothing was fetched or written.
    """
    for one in swept:
        environment.check_gpu(one.params.regress.placement)
        pairs.check_cases(Case.of(one.params), pairs.Setup.of(one.params))
    with waiting(folder / "locks.json"):
        pins = SourceLocks(folder / "locks.json", _known_locks(), swept[0].params.download)
        fetched, merged = _need(swept, pins)
        if fetched:
            check_room(fetched, merged, folder)
        every = [_pin(one, pins, folder / "points") for one in swept]
        pins.write()
    once = tuple({planned.point.key: planned for planned in reversed(every)}.values())[::-1]
    missing = tuple(planned for planned in once if not planned.point.is_done(keep=keep))
    check_room(0, merged * (len(missing) if keep else min(1, len(missing))), folder)
    clear_leftovers(folder / "points", [planned.point for planned in missing])
    return Plan(once, missing, merged, len(every) - len(once), keep)


def _known_locks() -> list[Lock]:
    """What the build has pinned: a sweep keeps to its commits."""
    if not (paths.HERE.base_lock.exists() and paths.HERE.lora_lock.exists()):
        return []
    base, loras = paths.HERE.read_locks()
    return [base, *loras.values()]


def _need(swept: Sequence[SweptParams], pins: SourceLocks) -> tuple[int, int]:
    """Bytes to fetch for all points, and bytes of the largest merged checkpoint, before anything is fetched.

    Raises:
        BadSource: a base is not there.
    """
    sizes: dict[object, source_sizes.SourceSize] = {}
    largest = 0
    for params in (one.params for one in swept):
        if params.base.place not in sizes:
            sizes[params.base.place] = pins.sizes(params.base)
        base = sizes[params.base.place]
        largest = max(largest, base.total if params.fuse.untouched == "copy" else base.below(COMPONENT))
        for lora in params.loras.values():
            if (lora.place, lora.filename) not in sizes:
                with suppress(Refused):  # this point's own matter, said when it is pinned
                    sizes[lora.place, lora.filename] = pins.sizes(lora, lora.filename)
    return sum(one.to_fetch for one in sizes.values()), largest


def _pin(one: SweptParams, pins: SourceLocks, folder: Path) -> Planned:
    """Have the files of a point on this machine, and name its folder below `folder` after all that it depends on."""
    params = one.params
    base, loras, problem = pins.base(params.base), {}, None
    try:
        loras = {name: pins.lora(lora, lora.filename) for name, lora in sorted(params.loras.items())}
    except Refused as error:
        problem = error
    environment.make_deterministic(params.regress.threads, on_gpu=params.regress.placement != "cpu")
    here = environment.environment(params.regress.placement, params.regress.dtype)
    alone = _inputs_alone(params, base, here)
    inputs = alone | _inputs_merged(params, loras, here)
    if problem is not None:
        inputs["loras"] = {name: lora.model_dump() for name, lora in params.loras.items()}
    key = key_of(inputs)
    point = Point(" ".join(one.overrides), key, folder / key[:16])
    return Planned(one, point, base, loras, inputs, alone, problem)


def _inputs_alone(params: Recipe, base: Lock, here: environment.Environment) -> dict[str, Any]:
    """What the base's own pictures depend on."""
    regress = params.regress
    cases = {
        name: case.model_dump() | {"sha256": [files.hash_file(Path(image)).sha256 for image in case.images]}
        for name, case in regress.cases.items()
    }
    return {
        "engine": [ENGINE, checkout.this_version()],
        "base": _locked(base),
        "pipeline": params.base.pipeline,
        "condition_area": params.base.condition_area,
        "base_sampling": params.base.sampling.model_dump(),
        "cases": cases,
        "environment": json.loads(json.dumps(asdict(here))),
    }


def _inputs_merged(params: Recipe, loras: Mapping[str, Lock], here: environment.Environment) -> dict[str, Any]:
    """What a point's pictures, and the verdicts on them, depend on besides."""
    regress = params.regress
    approved = goldens.Goldens(paths.GOLDEN / params.name).for_run(here.key, list(regress.cases))
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
