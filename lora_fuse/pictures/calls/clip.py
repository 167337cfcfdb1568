"""Clips: what is shown of one, and how it flickers and moves. Of arrays only.

A clip is (frames, height, width, 3) levels. A picture of it has its first, middle and last frame side by side, so that
whatever is done with pictures is done with clips: metrics, goldens, maps of differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from lora_fuse.pictures.picture import Levels
from lora_fuse.recipe import records


def shown_frames(frames: Levels) -> Levels:
    """The first, middle and last frame of a clip, side by side; fewer of one that has fewer than three."""
    chosen = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
    return np.concatenate([frames[number] for number in chosen], axis=1)


def motion_levels(frames: Levels) -> float:
    """The mean difference from one frame to the next, over all values, in levels of 255: 0 of a still.

    As VBench measures temporal flickering of scenes that stand still (Huang et al. 2024, section 3.2).
    """
    steps = [np.abs(np.subtract(after, before, dtype=np.int16)) for before, after in itertools.pairwise(frames)]
    return float(np.mean([step.mean(dtype=np.float64) for step in steps])) if steps else 0.0


def flicker_levels(frames: Levels) -> float:
    """Half the mean second difference in time, over all values, in levels of 255: what moves steadily cancels in it.

    A value that jumps by d and back at every frame has the flicker d; one that grows steadily has 0.
    """
    found = []
    for number in range(1, len(frames) - 1):
        before, now, after = (frames[at].astype(np.int16) for at in (number - 1, number, number + 1))
        found.append(np.abs(before - 2 * now + after).mean(dtype=np.float64) / 2)
    return float(np.mean(found)) if found else 0.0


MEASURES: Mapping[str, Callable[[Levels], float]] = MappingProxyType(
    {"flicker": flicker_levels, "motion": motion_levels}
)


def measured(frames: Levels) -> dict[str, float]:
    """Every measure of a clip by itself, in levels of 255, in the digits that a record has of it."""
    return {name: records.rounded(measure(frames)) for name, measure in MEASURES.items()}
