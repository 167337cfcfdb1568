"""What shows on a picture by itself that a LoRA was too strong: clipped, noisy, a grid, washed out. Pure: arrays in.

A picture is compared with the base's own of the same case, so what its subject brings along does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from lora_fuse.pictures import metrics, picture


def clipped_share(levels: picture.Levels) -> float:
    """The share of values, 0 to 1, that are black or white to the last level: what burns out ends there."""
    return float(((levels == 0) | (levels == metrics.PEAK)).mean(dtype=np.float64))


def noise_levels(levels: picture.Levels) -> float:
    """The standard deviation of the noise in levels of 255, estimated over all channels (Immerkaer 1996).

    Raises:
        ValueError: the picture is smaller than 3 x 3 pixels.
    """
    if min(levels.shape[:2]) < 3:
        raise ValueError(f"noise is estimated over 3 x 3 pixels: got {levels.shape[1]}x{levels.shape[0]}")
    values = levels.astype(np.float64)
    rows = values[:-2] - 2 * values[1:-1] + values[2:]
    both = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(math.sqrt(math.pi / 2) / 6 * np.abs(both).mean())


def own_comb_db(levels: picture.Levels) -> float:
    """How far the harmonics of one period stand out in the picture itself, in dB, see `metrics.comb_db`."""
    return metrics.comb_db(levels, np.full_like(levels, int(levels.mean())))


def detail_levels(levels: picture.Levels) -> float:
    """The mean difference between neighbours along both axes, in levels of 255: what is washed out has little."""
    values = levels.astype(np.float64).mean(axis=-1)
    return float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean())


MEASURES: Mapping[str, Callable[[picture.Levels], float]] = MappingProxyType(
    {"clipped": clipped_share, "noise": noise_levels, "comb": own_comb_db, "detail": detail_levels}
)


def measure(levels: picture.Levels) -> dict[str, float]:
    """All of `MEASURES` by name."""
    return {name: take(levels) for name, take in MEASURES.items()}
