"""Distances between two pictures: one function each, of arrays only.

A picture is `picture.Levels`. A new regression metric is a function here, a row in
`METRICS` and a key of `lora_fuse.recipe.sections.LimitParams`, whose value `conf/` gives: null decides nothing.
Every function of two pictures is symmetric but for `ssimulacra2`, gives for identical ones the best value there is, and
raises ValueError for two of different sizes.
The libraries that measure are imported where they are used: a report that is only read needs none of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lora_fuse.pictures.damage import PEAK, comb_db, difference
from lora_fuse.pictures.picture import Latents, Levels

FLIP_BLOCK = 32  # pixels


def psnr_db(a: Levels, b: Levels) -> float:
    """Peak signal-to-noise ratio in dB, higher is nearer, infinite when identical.

    ``10 log10(255^2 / MSE)`` over all pixels and channels (Gonzalez and Woods, Digital Image Processing, 8.1).
    """
    mse = float(np.square(difference(a, b)).mean(dtype=np.float64))
    return math.inf if mse == 0 else 10 * math.log10(PEAK**2 / mse)


def max_abs(a: Levels, b: Levels) -> int:
    """The largest difference of any channel of any pixel, in levels of 255; lower is nearer."""
    return int(np.abs(difference(a, b)).max())


def mean_abs(a: Levels, b: Levels) -> float:
    """The mean absolute difference over all pixels and channels, in levels of 255; lower is nearer."""
    return float(np.abs(difference(a, b)).mean(dtype=np.float64))


def changed_share(a: Levels, b: Levels) -> float:
    """The share of pixels, 0 to 1, of which any channel differs; lower is nearer."""
    return float(difference(a, b).any(axis=-1).mean(dtype=np.float64))


def ssim(a: Levels, b: Levels) -> float:
    """Structural similarity, 1 at best: the mean over windows of 7 pixels and over channels.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", by scikit-image.

    Raises:
        ValueError: the pictures are smaller than a window.
    """
    from skimage.metrics import structural_similarity

    difference(a, b)
    return float(structural_similarity(a, b, channel_axis=-1, data_range=PEAK))  # type: ignore[no-untyped-call]


def ssimulacra2(a: Levels, b: Levels) -> float:
    """SSIMULACRA 2 of `a` as a distortion of `b`: 100 at best, 90 if no eye sees it, 70 good, 50 fair, 30 poor.

    Sneyers 2022, github.com/cloudinary/ssimulacra2.
    """
    from ssimulacra2 import compute_ssimulacra2

    difference(a, b)
    return float(compute_ssimulacra2(_file(b), _file(a)))


def _file(levels: Levels) -> io.BytesIO:
    """A picture as a file that costs nothing to write and to read."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="BMP")
    return buffer


def flip(a: Levels, b: Levels) -> float:
    """The mean of FLIP's map of what an eye sees when the pictures alternate: 0 at best, 1 at worst.

    Andersson et al. 2020, "FLIP: A Difference Evaluator for Alternating Images", at 67 pixels per degree.
    """
    return _mean(_flip_map(a, b))


def flip_worst(a: Levels, b: Levels) -> float:
    """The mean of FLIP's map in the worst of the blocks of 32 x 32 pixels: it sees the patch that a mean hides."""
    return _worst_block(_flip_map(a, b))


def _mean(errors: npt.NDArray[np.float32]) -> float:
    return float(errors.mean(dtype=np.float64))


def _worst_block(errors: npt.NDArray[np.float32]) -> float:
    rows, columns = (range(0, max(1, n - FLIP_BLOCK + 1), FLIP_BLOCK // 2) for n in errors.shape)
    return max(float(errors[i : i + FLIP_BLOCK, j : j + FLIP_BLOCK].mean()) for i in rows for j in columns)


def latents_l2(a: Latents, b: Latents) -> float:
    """``|a - b| / |b|`` of final latents (Euclidean norms), `b` the reference: 0 at best, NaN if either has one.

    The sharpest of all where both are of one run: nothing is rounded to levels, and the decoder does not blur it.
    """
    if a.shape != b.shape:
        raise ValueError(f"latents of different shapes cannot be compared: {a.shape} and {b.shape}")
    reference = np.linalg.norm(b.astype(np.float64))
    difference = np.linalg.norm(a.astype(np.float64) - b)
    return float(difference / reference) if difference else 0.0


def _flip_map(a: Levels, b: Levels) -> npt.NDArray[np.float32]:
    from flip_evaluator import evaluate

    difference(a, b)
    found, _, _ = evaluate(*(side.astype(np.float32) / PEAK for side in (b, a)), "LDR", applyMagma=False)
    errors: npt.NDArray[np.float32] = found[..., 0]
    return errors


@dataclass(frozen=True, slots=True)
class Metric:
    """A distance between two pictures, how a person calls it, its digits and unit, and which way is nearer.

    `best` is its value for identical pictures, and `worst` that of no pictures further apart, infinite where there is
    none; `of_latents` says that it measures their final latents instead.
    """

    measure: Callable[[Any, Any], float]
    title: str
    digits: str
    unit: str = ""
    best: float = 0.0
    worst: float = math.inf
    of_latents: bool = False

    @property
    def higher_is_nearer(self) -> bool:
        """True where a greater value means a smaller distance: where the best value is not 0."""
        return self.best > 0

    def holds(self, value: float, bound: float) -> bool:
        """True for a value within a bound; a NaN is within none."""
        return value >= bound if self.higher_is_nearer else value <= bound

    def can_be(self, value: float) -> bool:
        """True for a finite value that two pictures can have."""
        return math.isfinite(value) and min(self.best, self.worst) <= value <= max(self.best, self.worst)

    def tightest(self, bounds: Iterable[float]) -> float:
        """The bound that lets the least through."""
        return max(bounds) if self.higher_is_nearer else min(bounds)

    def loosened(self, bound: float, floor: float, times: float) -> float:
        """A bound that is never tighter than `times` the distance that the noise floor has: of a PSNR, in amplitude."""
        if math.isinf(self.best):
            return min(bound, floor - 20 * math.log10(times))
        if self.higher_is_nearer:
            return min(bound, self.best - times * (self.best - floor))
        return max(bound, times * floor)

    def text(self, value: float) -> str:
        """A value with its unit."""
        return "identical" if math.isinf(value) else f"{value:{self.digits}}{self.unit}"

    def bound_text(self, bound: float) -> str:
        """A limit with its unit."""
        return f"{bound:.4g}{self.unit}"


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "psnr_db": Metric(psnr_db, "PSNR", ".2f", " dB", best=math.inf, worst=0.0),
        "max_abs": Metric(max_abs, "largest difference", "g", " levels", worst=PEAK),
        "mean_abs": Metric(mean_abs, "mean difference", ".3g", " levels", worst=PEAK),
        "changed_share": Metric(changed_share, "share of changed pixels", ".3g", worst=1.0),
        "ssim": Metric(ssim, "SSIM", ".4f", best=1.0, worst=-1.0),
        "ssimulacra2": Metric(ssimulacra2, "SSIMULACRA 2", ".1f", best=100.0, worst=-math.inf),
        "flip": Metric(flip, "FLIP", ".4f", worst=1.0),
        "flip_worst": Metric(flip_worst, "FLIP of the worst block", ".4f", worst=1.0),
        "comb_db": Metric(comb_db, "comb of a grid", ".1f", " dB"),
        "latents_l2": Metric(latents_l2, "latents, relative L2", ".2e", of_latents=True),
    }
)


def apart(a: float, b: float) -> float:
    """The difference of two numbers of clips, in their unit."""
    return abs(a - b)


# Of two clips, by what each is by itself (`calls.clip.MEASURES`), over all of their frames.
OF_CLIPS: Mapping[str, Metric] = MappingProxyType(
    {
        "flicker": Metric(apart, "difference in flicker", ".3g", " levels", worst=PEAK),
        "motion": Metric(apart, "difference in motion", ".3g", " levels", worst=PEAK),
    }
)
EVERY: Mapping[str, Metric] = MappingProxyType({**METRICS, **OF_CLIPS})

# Metrics of levels, divided among cores: each part takes a second a megapixel at most, and FLIP's map is made once.
PARTS: tuple[tuple[str, ...], ...] = (
    ("flip", "flip_worst"),
    ("ssimulacra2",),
    ("psnr_db", "max_abs", "mean_abs", "changed_share", "ssim", "comb_db"),
)


def distances(a: Levels, b: Levels, names: Collection[str] | None = None) -> dict[str, float]:
    """The distances of two pictures by some metrics of levels, or by all of them; FLIP's map is made once.

    Raises:
        ValueError: they differ in size.
    """
    levels = [name for name, metric in METRICS.items() if not metric.of_latents]
    wanted = [name for name in levels if names is None or name in names]
    if is_same(a, b):
        return {name: METRICS[name].best for name in wanted}
    of_map = {"flip": _mean, "flip_worst": _worst_block}
    errors = _flip_map(a, b) if of_map.keys() & set(wanted) else np.empty(0, np.float32)
    return {name: of_map[name](errors) if name in of_map else METRICS[name].measure(a, b) for name in wanted}


def is_same(a: Levels, b: Levels) -> bool:
    """True for two pictures that are the same bit for bit."""
    return a.shape == b.shape and bool((a == b).all())


HEAT_TOP = 64  # levels, from which on a heat map is brightest
_HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float64)


def heat_map(a: Levels, b: Levels, most: int = 1 << 30) -> Levels:
    """Paint the differences of two pictures: black is equal, then purple, red, orange and yellow for 64 levels.

    The largest difference of any channel, on a logarithmic scale, so that one level is seen too. What a person looks
    at, not what is judged. The colours are five of matplotlib's "inferno".

    Where the longer side has more than `most` pixels, each pixel of the map is the hottest of a square of them.
    """
    largest = np.abs(difference(a, b)).max(axis=-1)
    step = -(-max(largest.shape) // most)
    for axis in range(2):
        largest = np.maximum.reduceat(largest, np.arange(0, largest.shape[axis], step), axis=axis)
    share = np.log2(1 + np.minimum(largest, HEAT_TOP)) / np.log2(1 + HEAT_TOP)
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(share, stops, channel) for channel in _HEAT.T], axis=-1)
    heat: Levels = colours.round().astype(np.uint8)
    return heat
