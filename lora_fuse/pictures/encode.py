"""The one encoder of pictures: PNG, which keeps every level, and WebP where a page would get too large."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from lora_fuse.pictures.picture import Levels, Picture

LARGE = 512  # pixels of the longer side, beyond which a page has WebP; the files beside it are lossless
# Of the WebP: SSIMULACRA 2 is at least 90, "visually lossless", at 421 pixels, which is as large as a page shows any
# (`python -m benchmarks.page_pictures`).
SIDE = 640
QUALITY = 92
CLIP_SIDE = 320  # of a clip on a page: a dozen of them make one that can still be mailed
CLIP_QUALITY = 75


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded picture as a page shows it; `kind` is its MIME type."""

    data: bytes
    kind: str = "image/png"

    @property
    def data_uri(self) -> str:
        """An address that holds the picture itself."""
        return f"data:{self.kind};base64," + base64.b64encode(self.data).decode("ascii")


def png(levels: Levels) -> bytes:
    """A PNG file; the same levels give the same bytes, and no metadata goes in."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    return buffer.getvalue()


def thumbnail(levels: Levels, side: int) -> Levels:
    """Shrink levels (Lanczos) until the longer side has at most `side` pixels."""
    image = Image.fromarray(levels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def encoded(picture: Picture, *, large: int = LARGE, side: int = SIDE, quality: int = QUALITY) -> Encoded:
    """Encode a picture for a page: a PNG where its longer side has at most `large` pixels, else a WebP.

    The longer side of the WebP is shrunk to `side` pixels.
    """
    if max(picture.size) <= large:
        return Encoded(picture.png)
    return _webp(thumbnail(picture.levels, side), quality=quality)


def playing(frames: Levels, frames_per_second: int, *, side: int = CLIP_SIDE, quality: int = CLIP_QUALITY) -> Encoded:
    """Encode a clip as an animated WebP that repeats, its longer side shrunk to `side` pixels.

    The same frames give the same bytes.
    """
    images = [Image.fromarray(thumbnail(frame, side)) for frame in frames]
    duration = round(1000 / frames_per_second)  # of a frame, in milliseconds
    buffer = io.BytesIO()
    settings = {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0}
    images[0].save(buffer, format="WEBP", quality=quality, method=4, **settings)
    return Encoded(buffer.getvalue(), "image/webp")


def encoded_map(heat: Levels) -> Encoded:
    """Encode a map of few colours for a page: a WebP that keeps them."""
    return _webp(heat, lossless=True)


def _webp(levels: Levels, **how: object) -> Encoded:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="WEBP", method=6, **how)
    return Encoded(buffer.getvalue(), "image/webp")
