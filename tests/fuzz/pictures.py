"""Parsers of pictures, and of files that are known by how they begin."""

import io
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from lora_fuse.checkpoint import file_kind
from lora_fuse.checkpoint.shards import read_header
from lora_fuse.errors import BadCheckpoint
from lora_fuse.pictures import picture
from tests.fuzz import formats
from tests.fuzz.parsers import Parser
from tests.fuzz.weights import in_file

MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **how)
    return buffer.getvalue()


@cache
def shown() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@cache
def pngs() -> list[bytes]:
    """A picture in all modes, with what else a PNG file may hold."""
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b", zip=True)
    info.add_itxt("c", "d", zip=True)
    made = [saved(shown().convert(mode), "PNG") for mode in MODES]
    made.append(saved(Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000), "PNG"))
    made.append(saved(shown().convert("P"), "PNG", transparency=bytes(range(256))))
    made.append(saved(shown(), "PNG", pnginfo=info, exif=turned(), icc_profile=b"x" * 200, dpi=(1, 1)))
    made.append(saved(shown(), "PNG", save_all=True, append_images=[shown().rotate(90)]))
    return made


@cache
def photographs() -> list[bytes]:
    jpegs = [
        saved(shown().convert(mode), "JPEG", **how)
        for mode in ("RGB", "L", "CMYK")
        for how in ({}, {"progressive": True})
    ]
    webps = [
        saved(shown(), "WEBP", **how) for how in ({}, {"lossless": True}, {"exif": turned(), "icc_profile": b"x" * 200})
    ]
    webps.append(saved(shown(), "WEBP", save_all=True, append_images=[shown().rotate(90)]))
    return [*jpegs, saved(shown(), "JPEG", exif=turned(), icc_profile=b"x" * 200), *webps]


def beginnings() -> list[bytes]:
    """A file of each known kind, by how it begins."""
    return [start + bytes(range(64)) for kind in file_kind.KINDS for start in kind.starts]


def kind_of(path: Path) -> None:
    file_kind.kind_of(path.read_bytes()[: file_kind.LOOKED_AT])
    with suppress(BadCheckpoint):
        read_header(path)


def rows() -> Iterator[Parser]:
    yield Parser(
        "picture, PNG", in_file(picture.read_levels, "x.png"), formats.PNG, pngs, errors=(OSError,), examples=25
    )
    yield Parser(
        "picture, JPEG or WebP", in_file(picture.read_levels, "x.png"), formats.raw, photographs, errors=(OSError,)
    )
    yield Parser("file kind", in_file(kind_of), formats.raw, beginnings)
