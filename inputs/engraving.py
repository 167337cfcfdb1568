"""A sheet in the manner of an old banknote: lines of one to two pixels in a single ink."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, ImageDraw

from inputs.canvas import Canvas, Color, Point, Shade, arc, mix, oval, rectangle

if TYPE_CHECKING:
    from collections.abc import Iterable

PAPER: Color = (247, 242, 228)
INK: Color = (24, 34, 44)
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)
WIDTH, HEIGHT = 1024, 704
TONES = 12  # from paper to ink: few, to keep the file small
OVAL = (300, 352, 170, 240)  # its centre and half axes
PITCH, THICKEST = 4.2, 3.4  # pixels from one engraved line to the next, and of a line in the deepest shadow
FINE = 8  # supersampling of the engraved lines


def engraving() -> Image.Image:
    """The picture, 1024 x 704, of few colours."""
    canvas = Canvas(WIDTH, HEIGHT, PAPER)
    _ground(canvas)
    _frame(canvas)
    _rosette(canvas, 711, 352)
    _oval(canvas)
    picture = canvas.finished()
    picture.paste(INK, (round(OVAL[0] - OVAL[2]), round(OVAL[1] - OVAL[3])), _vignette())
    return _few_tones(picture)


def _few_tones(picture: Image.Image) -> Image.Image:
    inks = [mix(PAPER, INK, step / (TONES - 1)) for step in range(TONES)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([level for ink in inks for level in ink])
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def _ground(canvas: Canvas) -> None:
    pale = mix(PAPER, INK, 0.34)
    for number in range(43):
        y = 60 + number * 14
        wave = [(x, y + 9 * math.sin(x / 34 + number * 0.6) * math.cos(x / 150)) for x in range(60, 966, 6)]
        canvas.line(wave, pale, 0.7)


def _frame(canvas: Canvas) -> None:
    band, hole = (rectangle(inset, inset, WIDTH - inset, HEIGHT - inset) for inset in (25, 79))
    canvas.polygon([*band, band[0], hole[0], *reversed(hole)], PAPER)
    for inset, width in ((18, 2.0), (25, 1.0), (79, 1.0), (85, 2.0)):
        corners = rectangle(inset, inset, WIDTH - inset, HEIGHT - inset)
        canvas.line([*corners, corners[0]], INK, width)
    for phase in range(8):
        turn = phase * math.pi / 4
        for y in (52, HEIGHT - 52):
            canvas.line([(x, y + 25 * math.sin(x / 17.6 + turn)) for x in range(80, WIDTH - 79, 3)], INK, 0.8)
        for x in (52, WIDTH - 52):
            canvas.line([(x + 25 * math.sin(y / 17.3 + turn), y) for y in range(80, HEIGHT - 79, 3)], INK, 0.8)
    for x, y in itertools.product((52, WIDTH - 52), (52, HEIGHT - 52)):
        canvas.polygon(rectangle(x - 27, y - 27, x + 27, y + 27), PAPER)
        for phase in range(6):
            canvas.line(_flower((x, y), 15, 10, 8, phase * math.pi / 24), INK, 0.8)
        canvas.line(oval(x, y, 26, 26), INK, 1.2)


def _flower(centre: Point, radius: float, depth: float, petals: int, phase: float) -> list[Point]:
    """A closed line that goes out and in again `petals` times."""
    points = []
    for step in range(petals * 48 + 1):
        turn = step * 2 * math.pi / (petals * 48)
        reach = radius + depth * math.sin(petals * (turn + phase))
        points.append((centre[0] + reach * math.cos(turn), centre[1] + reach * math.sin(turn)))
    return points


def _rosette(canvas: Canvas, x: float, y: float) -> None:
    canvas.polygon(oval(x, y, 196, 196), PAPER)
    layers = ((162, 31, 12, 8), (110, 36, 10, 8), (62, 26, 9, 6))
    for radius, depth, petals, lines in layers:
        for line in range(lines):
            canvas.line(_flower((x, y), radius, depth, petals, line * 2 * math.pi / petals / lines), INK, 1.0)
    for radius, width in ((195, 2.0), (134, 1.2), (77, 1.2), (35, 2.0)):
        canvas.line(oval(x, y, radius, radius), INK, width)
    canvas.polygon(oval(x, y, 34, 34), PAPER)
    for ray in range(48):
        turn = ray * math.pi / 24
        near, far = 9.0, 31.0 if ray % 2 else 22.0
        ends = [(x + reach * math.cos(turn), y + reach * math.sin(turn)) for reach in (near, far)]
        canvas.line(ends, INK, 1.0)
    canvas.polygon(oval(x, y, 6, 6), INK)


def _oval(canvas: Canvas) -> None:
    x, y, rx, ry = OVAL
    canvas.polygon(oval(x, y, rx + 14, ry + 14), PAPER)
    for grown, width in ((0, 2.4), (6, 1.0), (13, 2.0)):
        canvas.line(oval(x, y, rx + grown, ry + grown), INK, width)


def _vignette() -> Image.Image:
    """The lighthouse as ink, and no ink outside the oval."""
    ink = _hatched(_lighthouse())
    shape = Canvas(*ink.size, BLACK)
    shape.polygon(oval(ink.width / 2, ink.height / 2, OVAL[2], OVAL[3]), WHITE)
    return ImageChops.multiply(ink, shape.finished().convert("L"))


def _hatched(tones: Image.Image) -> Image.Image:
    """How much ink is where, 0 to 255: lines that swell where the tones are dark, crossed by others in the shadows."""
    width, height = tones.size
    light = tones.tobytes()
    ink = Image.new("L", (width * FINE, height * FINE))
    pen = ImageDraw.Draw(ink)

    def engrave(line: Iterable[Point], lightest: float) -> None:
        cuts = []
        for x, y in line:
            level = light[min(max(round(y), 0), height - 1) * width + min(max(round(x), 0), width - 1)]
            half = max(0.0, (1 - level / 255 - lightest) / (1 - lightest)) * THICKEST / 2
            cuts.append((x * FINE, (y - half) * FINE, (y + half) * FINE))
        for (x, upper, lower), (x2, upper2, lower2) in itertools.pairwise(cuts):
            if min(lower - upper, lower2 - upper2) > 2:
                pen.polygon([(x, upper), (x2, upper2), (x2, lower2), (x, lower)], fill=255)

    for row in range(-4, round(height / PITCH) + 5):
        engrave([(x, row * PITCH + 5 * math.sin(x / 52 + 0.6)) for x in range(width)], 0.0)
    for row in range(-round(height / PITCH), round(width / PITCH)):
        engrave([(row * PITCH * 1.1 + y * 0.7, y) for y in range(height)], 0.6)
    return ink.reduce(FINE)


def _lighthouse() -> Image.Image:
    """The tones, 340 x 480."""
    canvas = Canvas(340, 480, Shade(_grey(150), _grey(246)))
    canvas.soft(oval(278, 118, 46, 46), WHITE, 5, 1.0)
    left, right = [(70, 176, 64, 20), (104, 160, 40, 24), (40, 190, 50, 14)], [(290, 236, 60, 12), (300, 224, 34, 14)]
    for x, y, wide, high in (*left, *right):  # clouds
        canvas.soft(oval(x, y, wide, high), WHITE, 4, 1.0)
    canvas.polygon(rectangle(0, 352, 340, 480), Shade(_grey(190), _grey(70)))
    rng = random.Random(2)
    for row in range(15):
        for _ in range(5):
            middle, reach = rng.uniform(0, 340), rng.uniform(14, 30 + row * 3)
            canvas.polygon(oval(middle, 362 + row * 8, reach, 1.6 + row * 0.25), _grey(rng.choice((240, 215, 80))))
    rock = [(54, 420), (78, 388), (104, 380), (120, 358), (150, 350), (212, 350), (236, 366), (262, 374), (286, 408)]
    canvas.polygon([*rock, (320, 420)], Shade(_grey(190), _grey(20), "right"))
    for facet in (
        [(78, 388), (104, 380), (120, 358), (130, 392), (104, 416)],
        [(150, 350), (176, 350), (186, 388), (172, 414), (156, 390)],
        [(200, 352), (222, 374), (232, 412), (206, 396)],
    ):
        canvas.polygon(facet, _grey(225))
    for foam, wide in ((70, 34), (122, 44), (182, 40), (244, 44), (300, 30)):
        canvas.polygon(oval(foam, 422, wide, 6), WHITE)
    _tower(canvas)
    return canvas.finished().convert("L")


def _tower(canvas: Canvas) -> None:
    x, foot, top, bands = 178.0, 356.0, 132.0, 5
    for band in range(bands):
        shares = (band / bands, (band + 1) / bands)
        (low, y1), (high, y2) = ((46 - 16 * share, foot + (top - foot) * share) for share in shares)
        piece = [(x - low, y1), (x + low, y1), (x + high, y2), (x - high, y2)]
        canvas.polygon(piece, Shade(WHITE, _grey(140), "right") if band % 2 else Shade(_grey(130), _grey(0), "right"))
    for y in (282, 192):
        canvas.polygon(rectangle(x - 6, y, x + 6, y + 20), _grey(0))
    canvas.polygon(rectangle(x - 40, 120, x + 40, 133), Shade(_grey(140), _grey(0), "right"))
    canvas.polygon(rectangle(x - 22, 82, x + 22, 120), WHITE)
    for bar in (-21, -7, 7, 21):
        canvas.line([(x + bar, 82), (x + bar, 120)], _grey(0), 4)
    canvas.polygon([*arc(x, 84, 29, 32, 180, 360), (x + 29, 86), (x - 29, 86)], Shade(_grey(140), _grey(0), "right"))
    canvas.line([(x, 54), (x, 30)], _grey(0), 4)


def _grey(level: int) -> Color:
    return (level, level, level)
