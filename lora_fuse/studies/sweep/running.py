"""Builds the points of a sweep one after another; several processes on one folder share them.

A point is built by whoever holds its lock; a busy one is skipped and looked at again later. A killed process holds
nothing, so its point is built by the next one that comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_fuse.errors import Busy, NoDevice, NoSpace, Refused
from lora_fuse.machine import staging
from lora_fuse.studies.sweep.points import Point


@dataclass(slots=True)
class SweepProgress:
    """The points of a sweep by what became of them; `built` are those that this process made.

    `refused` has the sentence of each.
    """

    built: list[Point] = field(default_factory=list)
    refused: dict[Point, str] = field(default_factory=dict)
    busy: list[Point] = field(default_factory=list)


def run(
    points: Sequence[Point],
    build: Callable[[Point], str],
    *,
    inputs: Mapping[Point, Mapping[str, object]],
    keep: bool,
    tell: Callable[[Point, str], None],
) -> SweepProgress:
    """Build every point that is not there yet and that no other process is building.

    `build` makes all but the record, of `inputs`, and returns the result in words, which `tell` gets; a refusal is
    recorded, and the others go on. With `keep` the merged checkpoints stay.

    Raises:
        NoSpace: there is no room for any other point either.
        NoDevice: nor is there a GPU for one.
    """
    sweep = SweepProgress()
    pending = list(points)
    while pending:
        busy = []
        for point in pending:
            try:
                if not point.is_done(keep=keep):
                    with staging.exclusive(point.folder):
                        tell(point, _build_one(point, build, inputs[point], sweep, keep=keep))
            except Busy:
                busy.append(point)
        if len(busy) == len(pending):
            break
        pending = busy
    sweep.busy = pending
    return sweep


def _build_one(
    point: Point,
    build: Callable[[Point], str],
    inputs: Mapping[str, object],
    sweep: SweepProgress,
    *,
    keep: bool,
) -> str:
    """Build a point whose lock is held, and note in `sweep` what became of it; the same in a few words."""
    if point.is_done(keep=keep):
        return "built by another process"
    try:
        result = build(point)
    except (NoSpace, NoDevice, Busy):
        raise
    except Refused as error:
        point.refuse(inputs, str(error))
        sweep.refused[point] = str(error)
        return "refused"
    point.finish(inputs, kept=keep)
    sweep.built.append(point)
    return result
