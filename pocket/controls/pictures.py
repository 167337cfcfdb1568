"""Damage to finished pictures, and changes that are none."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from lora_fuse.pictures import picture

PATCH = (32, 48)  # rows, columns
NOISE_SHARE = 0.03  # of the values, each one level up or down: between the unfused and the merged picture it is 0.015


def patch(levels: picture.Levels) -> picture.Levels:
    """Move a patch in the middle by 8 pixels."""
    top = (levels.shape[0] - PATCH[0]) // 2
    left = (levels.shape[1] - PATCH[1]) // 2
    area = np.s_[top : top + PATCH[0], left : left + PATCH[1]]
    out = levels.copy()
    out[area] = np.roll(levels[area], 8, axis=1)
    return out


def grid(levels: picture.Levels, period: int) -> picture.Levels:
    """Make every `period`-th row and column one level brighter, or darker where it is white."""
    lines = np.zeros(levels.shape, dtype=np.int16)
    lines[::period] = lines[:, ::period] = 1
    return _moved(levels, lines)


def noise(levels: picture.Levels) -> picture.Levels:
    """Move some values one level up or down, by a fixed seed."""
    rng = np.random.default_rng(0)
    hit = rng.random(levels.shape) < NOISE_SHARE
    return _moved(levels, hit * rng.choice(np.array([-1, 1], dtype=np.int16), levels.shape))


def reencoded(levels: picture.Levels) -> picture.Levels:
    """Send levels through a PNG without compression and one with the most."""
    for effort in (0, 9):
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, format="PNG", compress_level=effort)
        levels = picture.levels_of(Image.open(buffer))
    return levels


def _moved(levels: picture.Levels, by: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> picture.Levels:
    inside = np.clip(levels + by, 0, 255)
    moved: picture.Levels = np.where(inside == levels, levels - by, inside).clip(0, 255).astype(np.uint8)
    return moved
