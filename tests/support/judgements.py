"""Cases that are judged: made-up pictures, their goldens and their noise."""

from collections.abc import Sequence

import numpy as np

from lora_fuse.pictures.cases import Case
from lora_fuse.pictures.picture import Latents, Levels, Picture
from lora_fuse.regression.case_judgement import examine
from lora_fuse.regression.verdicts import CaseResult, Golden, Limits, Rules, compare


def smooth(size: int = 128) -> Levels:
    """A slope from dark to bright."""
    ramp = np.linspace(40, 200, size)
    return np.repeat((ramp[:, None] + ramp[None, :])[..., None] / 2, 3, axis=-1).round().astype(np.uint8)


UNFUSED = Limits({"psnr_db": 38, "max_abs": 64})
GOLDEN = Limits({"psnr_db": 50, "max_abs": 8})
RULES = Rules(UNFUSED, GOLDEN)
CASE = Case("rabbit", "make it purple", seed=0)


def scene(seed: int = 0, height: int = 64, width: int = 64) -> Levels:
    """A picture with contrast that no change below pushes over the edge of the range."""
    return np.random.default_rng(seed).integers(60, 190, (height, width, 3), dtype=np.uint8)


SAME = compare(Picture(scene()), Picture(scene()))


def noisy(picture: Levels, levels: int) -> Levels:
    noise = np.random.default_rng(1).integers(-levels, levels + 1, picture.shape)
    return (picture + noise).astype(np.uint8)


def brighter(levels: int) -> Levels:
    """The scene, every second row moved by as many levels."""
    picture = scene()
    picture[::2] += np.uint8(levels)
    return picture


def look(
    merged: Levels,
    unfused: Levels | None = None,
    golden: Levels | Sequence[Golden] | None = None,
    nonfinite: int = 0,
    rules: Rules = RULES,
) -> CaseResult:
    other = merged if unfused is None else unfused
    match golden:
        case None:
            goldens: Sequence[Golden] = ()
        case np.ndarray():
            goldens = (Golden(golden, name="rabbit.png"),)
        case _:
            goldens = golden
    return examine(CASE, Picture(merged, nonfinite), Picture(other), goldens, rules)


def latents(noise: float = 0.0, seed: int = 1) -> Latents:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4, 64)).astype(np.float32)
    return (base + noise * np.random.default_rng(seed).standard_normal(base.shape)).astype(np.float32)


def with_floor(
    merged: Latents | None, floor: Latents | None, over_floor: float | None = 2.0, golden: Levels | None = None
) -> CaseResult:
    return examine(
        CASE,
        Picture(scene(), latents=merged),
        Picture(scene(), latents=latents()),
        [Golden(scene() if golden is None else golden, name="rabbit.png")],
        Rules(UNFUSED, GOLDEN, over_floor),
        None if floor is None else Picture(scene(), latents=floor),
    )
