"""A picture is uint8 levels from render to report, PNG-encoded once, with what is known from before rounding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_fuse.machine import files
from lora_fuse.pictures import encode
from lora_fuse.pictures.render_progress import Cost

Levels: TypeAlias = npt.NDArray[np.uint8]  # (height, width, 3), 0 to 255
FORMATS = ("PNG", "JPEG", "WEBP")  # those of a picture from outside
LARGEST = 1 << 26  # pixels of one: 8192 x 8192, 200 MB of levels

Latents: TypeAlias = npt.NDArray[np.float32]  # of any shape


@dataclass(frozen=True, eq=False)
class Picture:
    """Levels, and of a picture that was just rendered the numbers behind them.

    Attributes:
        levels: (height, width, 3).
        nonfinite: count of the height x width x 3 values that were NaN or infinite; they are painted 0.
        latents: the final ones, float32, in the pipeline's own packing; None of a picture from a file.
        sigmas: visited, as many as steps, then 0; none of a scheduler that has none.
        frames: all of a clip, (frames, height, width, 3), of which `levels` shows three; None of a picture, and of a
            clip that is read from a file.
        frames_per_second: at which they are played.
        clip: how it flickers and moves, see `calls.clip`; nothing of a picture.
    """

    levels: Levels
    nonfinite: int = 0
    latents: Latents | None = None
    sigmas: tuple[float, ...] = ()
    frames: Levels | None = None
    frames_per_second: int = 0
    clip: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.levels.shape[:2]
        return width, height

    @property
    def png(self) -> bytes:
        """The levels as a PNG file, see `encode.png`; it is kept."""
        if "_png" not in vars(self):  # `cached_property` has one lock for all pictures before Python 3.12
            vars(self)["_png"] = encode.png(self.levels)
        made: bytes = vars(self)["_png"]
        return made


@dataclass(frozen=True, eq=False, kw_only=True)
class Rendered(Picture):
    """A picture that this process rendered, its final latents and its time and memory."""

    latents: Latents
    cost: Cost


def levels_of(image: Image.Image) -> Levels:
    """A PIL image's levels."""
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def read_levels(path: Path) -> Levels:
    """The levels of a picture file, upright and RGB as `diffusers.utils.load_image` gives it.

    The file may be anybody's: of Pillow's formats, some of which start other programs, it is one of `FORMATS`, and its
    size is looked at before it is decoded.

    Raises:
        OSError: the file is missing, no whole picture of these formats, or larger than `LARGEST`.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            files.open_regular(path) as file,
            Image.open(file, formats=FORMATS) as image,
        ):
            if image.width * image.height > LARGEST:
                raise OSError(f"it has {image.width} x {image.height} pixels; give one of at most {LARGEST}")
            return levels_of(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise OSError(f"it is none of {', '.join(FORMATS)}; save it as one of them") from error
    except OSError:
        raise
    except Exception as error:  # a broken picture may raise anything in Pillow's readers
        raise OSError(f"it is no whole picture ({type(error).__name__}: {error})") from error
