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
    """How a sweep stands: its points by what became of them; `built` are those that this process made.

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

    Args:
        points: in the order to build them.
        build: makes all but the record and says what it came to; what it refuses is recorded, and the others go on.
        inputs: what the key of each is of.
        keep: leave the merged checkpoints.
        tell: is told what became of each, in a few words.

    Raises:
        NoSpace: there is no room for any other point either.
        NoDevice: nor is there a GPU for one.
    """
    standing, pending = SweepProgress(), list(points)
    while pending:
        busy = []
        for point in pending:
            try:
                if not point.is_done(keep=keep):
                    with staging.exclusive(point.folder):
                        said = _build_one(point, build, inputs[point], keep=keep)
                        if said.refused:
                            standing.refused[point] = said.sentence
                        elif not said.elsewhere:
                            standing.built.append(point)
                        tell(point, str(said))
            except Busy:
                busy.append(point)
                continue
        if len(busy) == len(pending):
            break
        pending = busy
    standing.busy = pending
    return standing


@dataclass(frozen=True, slots=True)
class _Said:
    sentence: str
    refused: bool = False
    elsewhere: bool = False

    def __str__(self) -> str:
        return "refused" if self.refused else self.sentence


def _build_one(point: Point, build: Callable[[Point], str], inputs: Mapping[str, object], *, keep: bool) -> _Said:
    if point.is_done(keep=keep):
        return _Said("built by another process", elsewhere=True)
    try:
        said = build(point)
    except (NoSpace, NoDevice, Busy):
        raise
    except Refused as error:
        point.refuse(inputs, str(error))
        return _Said(str(error), refused=True)
    point.finish(inputs, kept=keep)
    return _Said(said)
