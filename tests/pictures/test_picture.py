"""Laws of pictures from outside: three formats, no program for any other, and a bound before they are decoded."""

import os
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_fuse.pictures.picture import FORMATS, LARGEST, read_levels

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_of_a_format_that_is_used_is_read_under_any_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    Image.fromarray(LEVELS).save(path, format=kind, **({} if kind == "JPEG" else {"lossless": True}))
    read = read_levels(path)
    assert read.shape == LEVELS.shape
    assert kind == "JPEG" or (read == LEVELS).all()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS"])
def test_any_other_format_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(LEVELS).save(path, format=kind)
    with pytest.raises(OSError, match=r"^it is none of PNG, JPEG, WEBP; save it as one of them$"):
        read_levels(path)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Pillow's formats, EPS is drawn by Ghostscript, which runs what the author of the file wrote."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n", encoding="utf-8")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "rabbit.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) run\n%%EOF\n")
    with pytest.raises(OSError, match="none of PNG"):
        read_levels(path)
    assert not (tmp_path / "ran").exists()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(("width", "height"), [(LARGEST + 1, 1), (1 << 13, (1 << 13) + 1), (100_000, 100_000)])
def test_a_picture_that_says_it_is_huge_is_refused_before_it_is_decoded(
    width: int, height: int, tmp_path: Path
) -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path = tmp_path / "huge.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))))
    with pytest.raises(OSError, match=r"pixels"):
        read_levels(path)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("a text of 100 MB", (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))), ("short", (b"tRNS", b"x"))],
)
def test_a_chunk_that_is_a_bomb_or_too_short_is_one_kind_of_error(
    name: str, chunk: tuple[bytes, bytes], tmp_path: Path
) -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    rows = png_chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    path = tmp_path / f"{name}.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(*chunk) + rows + png_chunk(b"IEND", b""))
    with pytest.raises(OSError, match="no whole picture"):
        read_levels(path)


def test_a_huge_picture_is_refused_without_a_warning(tmp_path: Path) -> None:
    """Pillow's would be lines of their own on the terminal."""
    path = tmp_path / "huge.png"
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))))
    with warnings.catch_warnings(record=True) as caught, pytest.raises(OSError, match=r"10000 x 10000 pixels; give"):
        read_levels(path)
    assert caught == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    """Pillow's readers raise SyntaxError, ValueError, struct.error and more."""
    path = tmp_path / "picture"
    Image.fromarray(LEVELS).save(path, format=kind)
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(whole)
        for at in random.integers(0, len(whole), random.integers(1, 6)):
            broken[at] = random.integers(0, 256)
        path.write_bytes(broken[: random.integers(1, len(whole) + 1)])
        with suppress(OSError):
            read_levels(path)
