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
QUALITY = 90  # of WebP: looks the same at a tenth of the size


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


def encoded(picture: Picture, *, large: int = LARGE, side: int | None = None, quality: int = QUALITY) -> Encoded:
    """Encode a picture for a page: a PNG where its longer side has at most `large` pixels, else a WebP.

    The longer side of the WebP is shrunk to `side` pixels; None keeps its size.
    """
    if max(picture.size) <= large:
        return Encoded(picture.png)
    buffer = io.BytesIO()
    shown = picture.levels if side is None else thumbnail(picture.levels, side)
    Image.fromarray(shown).save(buffer, format="WEBP", quality=quality)
    return Encoded(buffer.getvalue(), "image/webp")
