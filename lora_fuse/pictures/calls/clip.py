"""Clips: what is shown of one, how it flickers and moves, and the file that plays it. Of arrays only.

A clip is (frames, height, width, 3) levels. A picture of it has its first, middle and last frame side by side, so that
whatever is done with pictures is done with clips: metrics, goldens, maps of differences.
"""

from __future__ import annotations

import numpy as np

from lora_fuse.pictures.picture import Levels

MOST_BYTES = 1 << 26  # of values that are measured at once


def shown_frames(frames: Levels) -> Levels:
    """The first, middle and last frame of a clip, side by side; a clip of one frame is that frame."""
    chosen = dict.fromkeys((0, len(frames) // 2, len(frames) - 1))
    return np.concatenate([frames[number] for number in chosen], axis=1)
