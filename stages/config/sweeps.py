"""A sweep as Hydra reads it: every point of it, with all of its parameters, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_fuse.errors import BadConfig
from lora_fuse.studies.sweep import SweptPoint
from stages.config import load
from stages.config.composition import split_sweep


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep as it was asked for, and its points; two of them may be the same."""

    arguments: tuple[str, ...]
    points: tuple[SweptPoint, ...]


def expand(arguments: Sequence[str]) -> Swept:
    """Every point of a sweep in Hydra's grammar (``fuse.scale=0.6,0.8 lora=v1,v2``), in Hydra's order, all checked.

    Raises:
        BadConfig: nothing is swept, a sweep is not of single values, or a point does not compose; nothing was built.
    """
    swept = split_sweep(arguments)
    given = " ".join(arguments) or "no arguments"
    if swept is None:
        raise BadConfig(f"{given}: nothing to sweep; give a key several values: fuse.scale=0.6,0.8,1.0,1.2")
    if not swept[1]:
        raise BadConfig(f"{given}: a sweep of no points, as a range or choice in it is empty; give it values")
    fixed, points = swept
    return Swept(tuple(arguments), tuple(SweptPoint(point, load([*fixed, *point])) for point in points))
