"""A canvas that is painted larger than the picture and reduced at the end, so that every edge is smooth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFilter, ImageFont

Color = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 3


@dataclass(frozen=True, slots=True)
class Shade:
    """A fill that goes from one colour to another: downwards, to the right, or outwards from a point.

    `x` and `y` say where an outward shade starts, in shares of the shape's width and height.
    """

    start: Color
    end: Color
    way: Literal["down", "right", "out"] = "down"
    x: float = 0.5
    y: float = 0.5


Fill = Color | Shade


class Canvas:
    """Paints in units of the finished picture's pixels."""

    def __init__(self, width: int, height: int, ground: Fill) -> None:
        self.size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        self.image = Image.new("RGB", self.size)
        self.polygon(rectangle(0, 0, width, height), ground)

    def finished(self) -> Image.Image:
        """The picture in its own size."""
        return self.image.reduce(SUPERSAMPLING)

    def polygon(self, points: Sequence[Point], fill: Fill) -> None:
        """Fill a shape."""
        if not isinstance(fill, Shade):
            ImageDraw.Draw(self.image).polygon(_scaled(points), fill=fill)
            return
        mask = self._mask(points)
        box = mask.getbbox()
        if box:
            self.image.paste(_shaded(fill, (box[2] - box[0], box[3] - box[1])), box, mask.crop(box))

    def line(self, points: Sequence[Point], color: Color, width: float = 1.0) -> None:
        """Draw a line through all points."""
        thick = max(1, round(width * SUPERSAMPLING))
        ImageDraw.Draw(self.image).line(_scaled(points), fill=color, width=thick, joint="curve")

    def soft(self, points: Sequence[Point], color: Color, blur: float, strength: float) -> None:
        """Lay a blurred shape over the picture: a shadow, or light."""
        mask = self._mask(points)
        small = mask.reduce(SUPERSAMPLING).filter(ImageFilter.GaussianBlur(blur))
        mask = small.resize(self.size, Image.Resampling.BILINEAR).point([round(v * strength) for v in range(256)])
        self.image.paste(color, (0, 0), mask)

    def text(self, centre: Point, text: str, size: float, color: Color, bold: float = 0.0, space: float = 0.0) -> None:
        """Write a line of capitals around a point, in Pillow's own font (Aileron).

        Args:
            centre: the middle of the text.
            text: what to write.
            size: the font's size.
            color: of the letters.
            bold: by how much the letters' lines are thickened.
            space: added between letters.
        """
        font = ImageFont.load_default(size * SUPERSAMPLING)
        widths = [font.getlength(letter) / SUPERSAMPLING for letter in text]
        left, pen = centre[0] - (sum(widths) + space * (len(text) - 1)) / 2, ImageDraw.Draw(self.image)
        for letter, width in zip(text, widths, strict=True):
            at = _scaled([(left + width / 2, centre[1] + 0.36 * size)])[0]
            pen.text(at, letter, fill=color, font=font, anchor="ms", stroke_width=round(bold * SUPERSAMPLING))
            left += width + space

    @contextmanager
    def inside(self, points: Sequence[Point]) -> Iterator[None]:
        """What is painted meanwhile stays inside a shape."""
        before = self.image.copy()
        yield
        self.image = Image.composite(self.image, before, self._mask(points))

    def _mask(self, points: Sequence[Point]) -> Image.Image:
        mask = Image.new("L", self.size)
        ImageDraw.Draw(mask).polygon(_scaled(points), fill=255)
        return mask


def rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    """The corners of an upright rectangle; its right and bottom edges are not part of it."""
    edge = 1 / SUPERSAMPLING
    return [(left, top), (right - edge, top), (right - edge, bottom - edge), (left, bottom - edge)]


def oval(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> list[Point]:
    """An ellipse around a point, turned clockwise by `tilt` degrees."""
    return arc(x, y, rx, ry, 0, 360, tilt)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, tilt: float = 0.0) -> list[Point]:
    """A part of an ellipse, by degrees clockwise from the right."""
    steps = max(12, round(abs(end - start) / 3))
    turn = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [turned((x + rx * math.cos(t), y + ry * math.sin(t)), (x, y), tilt) for t in turn]


def rounded(left: float, top: float, right: float, bottom: float, radius: float) -> list[Point]:
    """A rectangle with round corners."""
    corners = ((right, bottom, -1, -1), (left, bottom, 1, -1), (left, top, 1, 1), (right, top, -1, 1))
    points: list[Point] = []
    for number, (x, y, inwards, down) in enumerate(corners):
        points += arc(x + inwards * radius, y + down * radius, radius, radius, 90 * number, 90 * number + 90)
    return points


def turned(point: Point, centre: Point, degrees: float) -> Point:
    """A point, turned clockwise around another."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = point[0] - centre[0], point[1] - centre[1]
    return centre[0] + c * x - s * y, centre[1] + s * x + c * y


def smooth(points: Sequence[Point], steps: int = 12) -> list[Point]:
    """A closed curve through all points (Catmull-Rom)."""
    out: list[Point] = []
    count = len(points)
    for i in range(count):
        a, b, c, d = (points[(i + k) % count] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            corners = tuple(zip(weights, (a, b, c, d), strict=True))
            out.append((sum(w * p[0] for w, p in corners) / 2, sum(w * p[1] for w, p in corners) / 2))
    return out


def mix(a: Color, b: Color, share: float) -> Color:
    """A colour between two."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def _scaled(points: Sequence[Point]) -> list[Point]:
    return [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]


def _shaded(shade: Shade, size: tuple[int, int]) -> Image.Image:
    width, height = size
    if shade.way == "out":
        # the gradient reaches the shape's far corner wherever it starts
        reach = (2 * width * max(shade.x, 1 - shade.x), 2 * height * max(shade.y, 1 - shade.y))
        ramp = Image.radial_gradient("L").resize((round(reach[0]), round(reach[1])), Image.Resampling.BILINEAR)
        left, top = round(reach[0] / 2 - shade.x * width), round(reach[1] / 2 - shade.y * height)
        ramp = ramp.crop((left, top, left + width, top + height))
    else:
        ramp = Image.linear_gradient("L")
        if shade.way == "right":
            ramp = ramp.transpose(Image.Transpose.TRANSPOSE)
        ramp = ramp.resize(size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", size, shade.end), Image.new("RGB", size, shade.start), ramp)
