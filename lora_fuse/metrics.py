"""What can be measured on a picture, or between two: one function each, of arrays only.

A picture is `Levels`: uint8, (height, width, 3), 0 to 255. A new regression metric is a function here, a row in
`METRICS`, a field in `golden.Comparison` and, where it decides, one in `golden.Limits`, whose value `conf/` gives.
Every function of two pictures is symmetric, and for identical pictures gives the best value there is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Levels: TypeAlias = npt.NDArray[np.uint8]  # (height, width, 3)

PEAK = 255
# A picture that failed as a whole (NaN painted black, an empty decode) has no contrast: 0 to 2 levels where the
# dullest rendered pictures had more than 10.
FLAT_STD = 3.0


def is_finite(values: npt.NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite; for values before they become levels, which cannot be either."""
    return bool(np.isfinite(values).all())


def is_flat(picture: Levels) -> bool:
    """Whether the picture is one colour: no channel has a standard deviation above `FLAT_STD` levels."""
    return bool((picture.reshape(-1, picture.shape[-1]).std(axis=0, dtype=np.float64) <= FLAT_STD).all())


def psnr_db(a: Levels, b: Levels) -> float:
    """Peak signal-to-noise ratio in dB, higher is nearer, infinite when identical.

    ``10 log10(255^2 / MSE)`` over all pixels and channels (Gonzalez and Woods, Digital Image Processing, 8.1).

    Raises:
        ValueError: the pictures differ in size.
    """
    mse = float(np.square(_difference(a, b)).mean(dtype=np.float64))
    return math.inf if mse == 0 else 10 * math.log10(PEAK**2 / mse)


def max_abs(a: Levels, b: Levels) -> int:
    """The largest difference of any channel of any pixel, in levels of 255; lower is nearer.

    Raises:
        ValueError: the pictures differ in size.
    """
    return int(np.abs(_difference(a, b)).max())


def mean_abs(a: Levels, b: Levels) -> float:
    """The mean absolute difference over all pixels and channels, in levels of 255; lower is nearer.

    Raises:
        ValueError: the pictures differ in size.
    """
    return float(np.abs(_difference(a, b)).mean(dtype=np.float64))


def changed_share(a: Levels, b: Levels) -> float:
    """The share of pixels, 0 to 1, of which any channel differs; lower is nearer.

    Raises:
        ValueError: the pictures differ in size.
    """
    return float(_difference(a, b).any(axis=-1).mean(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Metric:
    """A distance between two pictures, how a person calls it, its unit, and which way is nearer."""

    measure: Callable[[Levels, Levels], float]
    title: str
    unit: str
    higher_is_nearer: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "psnr_db": Metric(psnr_db, "PSNR", "dB", higher_is_nearer=True),
        "max_abs": Metric(max_abs, "largest difference", "levels of 255"),
        "mean_abs": Metric(mean_abs, "mean difference", "levels of 255"),
        "changed_share": Metric(changed_share, "changed pixels", "share"),
    }
)


def amplified_difference(a: Levels, b: Levels, factor: int) -> Levels:
    """The absolute difference times `factor`, cut off at 255: what a person looks at, not what is judged.

    Raises:
        ValueError: the pictures differ in size.
    """
    amplified: Levels = np.minimum(np.abs(_difference(a, b)) * factor, PEAK).astype(np.uint8)
    return amplified


def to_levels(picture: Image.Image) -> Levels:
    """A PIL picture as levels, (height, width, 3)."""
    return np.asarray(picture.convert("RGB"), dtype=np.uint8)


def to_png(picture: Levels) -> bytes:
    """Levels as a PNG file; the same levels give the same bytes, and no metadata goes in."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _difference(a: Levels, b: Levels) -> npt.NDArray[np.int32]:
    """``a - b`` in a type that holds it, and its square."""
    for picture in (a, b):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
            raise ValueError(
                f"a picture is uint8 (height, width, 3): got {picture.dtype} {picture.shape}; convert it with to_levels"
            )
    if a.shape != b.shape:
        raise ValueError(
            f"pictures of different sizes cannot be compared: {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]}; "
            "render both at one size"
        )
    return a.astype(np.int32) - b.astype(np.int32)
