"""Input pictures drawn by code: a rabbit to edit, and a hat as the second picture of a two-picture edit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

SIZE = 256  # pixels, both sides


def rabbit() -> Image.Image:
    """A white cartoon rabbit on a meadow, 256 x 256."""
    picture = Image.new("RGB", (SIZE, SIZE), (158, 210, 240))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((196, 16, 240, 60), fill=(250, 214, 90))  # sun
    pen.ellipse((-60, 176, 316, 380), fill=(112, 176, 84))  # meadow
    fur, shade, pink, ink = (242, 238, 230), (206, 200, 192), (240, 164, 170), (52, 44, 48)
    for left in (84, 132):
        pen.ellipse((left, 14, left + 40, 122), fill=fur, outline=shade, width=3)
        pen.ellipse((left + 12, 32, left + 28, 108), fill=pink)
    pen.ellipse((68, 138, 188, 250), fill=fur, outline=shade, width=3)  # body
    pen.ellipse((70, 72, 186, 174), fill=fur, outline=shade, width=3)  # head
    for left in (100, 142):
        pen.ellipse((left, 104, left + 16, 126), fill=ink)
        pen.ellipse((left + 3, 107, left + 8, 113), fill=(255, 255, 255))
    pen.polygon([(120, 134), (136, 134), (128, 144)], fill=pink)
    pen.arc((114, 138, 128, 154), 0, 170, fill=ink, width=2)
    pen.arc((128, 138, 142, 154), 10, 180, fill=ink, width=2)
    for left in (82, 138):
        pen.ellipse((left, 226, left + 38, 252), fill=fur, outline=shade, width=3)  # feet
    return picture


def hat() -> Image.Image:
    """A red top hat on cream, 256 x 256."""
    picture = Image.new("RGB", (SIZE, SIZE), (246, 238, 220))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((24, 172, 232, 222), fill=(150, 30, 40))  # brim
    pen.rectangle((76, 60, 180, 196), fill=(196, 44, 52))
    pen.ellipse((76, 44, 180, 78), fill=(220, 78, 82))  # crown
    pen.rectangle((76, 154, 180, 182), fill=(248, 206, 84))  # ribbon
    pen.ellipse((76, 182, 180, 206), fill=(196, 44, 52))
    return picture


DRAWINGS: Mapping[str, Callable[[], Image.Image]] = {"rabbit.png": rabbit, "hat.png": hat}


def draw(folder: Path) -> None:
    """Write every drawing into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in DRAWINGS.items():
        make().save(folder / name, optimize=True)
