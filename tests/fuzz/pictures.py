"""Parsers of pictures, and of files that are known by how they begin."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from lora_fuse.checkpoint import file_kind
from lora_fuse.checkpoint.shards import read_header
from lora_fuse.errors import BadCheckpoint
from lora_fuse.pictures import picture, render
from pocket import POCKET
from tests.fuzz import formats
from tests.fuzz.parsers import Parser, these
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


CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "processor/preprocessor_config.json",
    "processor/tokenizer_config.json",
    "tokenizer/tokenizer_config.json",
)


def model(folder: Path) -> None:
    shutil.copytree(POCKET / "model", folder / "model")


def loaded(name: str) -> Callable[[Path, bytes], object]:
    """Load a pipeline of which one configuration is odd, as it is loaded to make pictures."""

    def parse(folder: Path, content: bytes) -> None:
        file = folder / "model" / name
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            render.load_pipeline(folder / "model", "QwenImageEditPipeline", dtype="float32")
        finally:
            file.write_bytes(before)

    return parse


def rows() -> Iterator[Parser]:
    yield Parser(
        "picture, PNG", in_file(picture.read_levels, "x.png"), formats.PNG, pngs, errors=(OSError,), examples=25
    )
    yield Parser(
        "picture, JPEG or WebP", in_file(picture.read_levels, "x.png"), formats.raw, photographs, errors=(OSError,)
    )
    yield Parser("file kind", in_file(kind_of), formats.raw, beginnings)
    for name in CONFIGS:
        valid = these((POCKET / "model" / name).read_bytes())
        yield Parser(f"pipeline, {name}", loaded(name), formats.JSON, valid, model, examples=0)  # its imports take long
