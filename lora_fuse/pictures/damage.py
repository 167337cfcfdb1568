"""Damage that shows on a picture: noise, clipped values, a grid, lost detail, a single colour. Of arrays only.

Each measure of `MEASURES` is of one picture; a study compares it with that of another picture of the same case, so that
what the subject brings along does not count. A grid is sought in the difference of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from lora_fuse.pictures.picture import Levels

PEAK = 255
# A picture that failed as a whole (NaN painted black, an empty decode) has no contrast: 0 to 2 levels where the
# dullest rendered pictures had more than 10.
FLAT_STD = 3.0
SHORTEST_PERIOD = 8  # pixels, of a grid: a patch of the transformers is 16
LONGEST_PERIOD = 64


def is_flat(picture: Levels) -> bool:
    """True for a picture of one colour: no channel has a standard deviation above `FLAT_STD` levels.

    A clip, (frames, height, width, 3), is flat where every frame is: it may begin or end with one that is.
    """
    if picture.ndim == 4:
        return all(map(is_flat, picture))
    return bool((picture.reshape(-1, picture.shape[-1]).std(axis=0, dtype=np.float64) <= FLAT_STD).all())


def noise_levels(picture: Levels) -> float:
    """Standard deviation of the noise of a value, in levels of 255: the estimate of each channel, averaged.

    ``sqrt(pi / 2) / 6`` times the mean of ``|channel * L|``, L the second differences along both axes, in which what is
    smooth and straight edges cancel (Immerkaer 1996, "Fast noise variance estimation"). The source defines it for one
    channel. The mean of three channels would be another picture: noise that is independent in each, of 5 levels, is
    5 / sqrt(3) = 2.9 levels there, and noise of opposite sign in two of them vanishes.

    Raises:
        ValueError: the picture is smaller than 3 x 3 pixels.
    """
    if min(picture.shape[:2]) < 3:
        raise ValueError(f"noise is estimated over 3 x 3 pixels: got {picture.shape[1]}x{picture.shape[0]}")
    values = picture.astype(np.float64)
    rows = values[:-2] - 2 * values[1:-1] + values[2:]
    both = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(math.sqrt(math.pi / 2) / 6 * np.abs(both).mean())


def clipped_share(picture: Levels) -> float:
    """The share of values, 0 to 1, that are black or white to the last level: what burns out ends there."""
    return float(((picture == 0) | (picture == PEAK)).mean(dtype=np.float64))


def detail_levels(picture: Levels) -> float:
    """The mean difference between neighbours along both axes, in levels of 255: what is washed out has little."""
    values = picture.astype(np.float64).mean(axis=-1)
    return float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean())


def own_comb_db(picture: Levels) -> float:
    """The prominence of the harmonics of one period in the picture itself, in dB, see `comb_db`."""
    return comb_db(picture, np.full_like(picture, int(picture.mean())))


def comb_db(a: Levels, b: Levels) -> float:
    """The prominence of the harmonics of one period in the spectrum of ``a - b``, in dB: a grid shows as a comb.

    A faint grid, as a wrong 8-bit scale leaves it at every patch, is ordinary drift to every metric of pixels. For each
    axis and each period of 8 to 64 pixels, the mean level (dB) of the harmonics over the median of their neighbours;
    the largest of these, at least 0.
    """
    residual = difference(a, b).mean(axis=-1)
    return max(0.0, *(_comb_along(side) for side in (residual, residual.T)))


def _comb_along(residual: npt.NDArray[np.float64]) -> float:
    """The gain of the best period along the second axis."""
    length = residual.shape[1]
    spectrum = np.fft.rfft((residual - residual.mean(axis=1, keepdims=True)) * np.hanning(length), axis=1)
    power = np.square(np.abs(spectrum)).mean(axis=0)
    if not power.any():
        return 0.0
    level = 10 * np.log10(power + 1e-9 * power.max())
    gains = [0.0]
    for period in range(SHORTEST_PERIOD, min(LONGEST_PERIOD, length // 8) + 1):
        spacing = length / period
        harmonics = np.rint(np.arange(1, period // 2 + 1) * spacing).astype(int)
        reach = max(3, int(spacing / 2))
        near = harmonics[:, None] + np.concatenate([np.arange(-reach, -1), np.arange(2, reach + 1)])
        near = np.clip(near, 1, len(level) - 1)
        gains.append(float((level[np.minimum(harmonics, len(level) - 1)] - np.median(level[near], axis=1)).mean()))
    return max(gains)


def difference(a: Levels, b: Levels) -> npt.NDArray[np.int32]:
    """``a - b`` in a type that holds it, and its square.

    Raises:
        ValueError: one is no picture, or they differ in size.
    """
    for picture in (a, b):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
            raise ValueError(
                f"a picture is uint8 (height, width, 3): got {picture.dtype} {picture.shape}; convert it with levels_of"
            )
    if a.shape != b.shape:
        raise ValueError(
            f"pictures of different sizes cannot be compared: {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]}; "
            "render both at one size"
        )
    return a.astype(np.int32) - b.astype(np.int32)


MEASURES: Mapping[str, Callable[[Levels], float]] = MappingProxyType(
    {"clipped": clipped_share, "noise": noise_levels, "comb": own_comb_db, "detail": detail_levels}
)
