"""The effect of a LoRA on a picture, as numbers: of arrays only.

Same seed and few steps: the latents of two runs lie in one space, and what a LoRA does to them is a vector there, the
difference to the same run without it. Two versions of a LoRA that are meant for the same thing point the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_fuse.pictures import metrics

if TYPE_CHECKING:
    from lora_fuse.pictures import picture


@dataclass(frozen=True, slots=True)
class Effect:
    """The new LoRA's effect beside the current one's."""

    alignment: float  # cosine of the angle between the two, 1 for the same direction, 0 for unrelated ones
    strength: float  # how much of the current one's effect the new one has, by projection: 1 for as much


def effect(new: picture.Latents, current: picture.Latents, plain: picture.Latents) -> Effect | None:
    """Compare what two LoRAs do to the same run without either; None if the current one does nothing.

    With ``n = new - plain`` and ``c = current - plain``: ``n.c / (|n| |c|)`` and ``n.c / |c|^2``.

    Raises:
        ValueError: they differ in shape.
    """
    if not new.shape == current.shape == plain.shape:
        raise ValueError(f"latents of different shapes: {new.shape}, {current.shape} and {plain.shape}")
    n, c = ((side.astype(np.float64) - plain).ravel() for side in (new, current))
    size = float(np.linalg.norm(c))
    if size == 0:
        return None
    product = float(n @ c)
    own = float(np.linalg.norm(n))
    return Effect(product / (own * size) if own else 0.0, product / size**2)


def gain(picture: picture.Latents, plain: picture.Latents, teacher: picture.Latents) -> float:
    """The share that is gone of the way from the base in few steps to the base in all of its steps: 1 is all of it.

    ``1 - |picture - teacher| / |plain - teacher|``; below 0 the LoRA leads away. For LoRAs that save steps.

    Raises:
        ValueError: latents differ in shape.
    """
    way = metrics.latents_l2(plain, teacher)
    return 1 - metrics.latents_l2(picture, teacher) / way if way else math.nan
