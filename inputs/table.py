"""A still life on a wooden table: a cup on a saucer, an apple and a spoon."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING

from inputs.canvas import Canvas, Color, Point, Shade, arc, mix, oval, rectangle, smooth, turned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)
EDGE = 330  # where the table ends and the wall begins
SHADOW: Color = (52, 24, 8)
CHINA: Color = (240, 242, 244)
BLUE: Color = (58, 98, 150)
RED: Color = (200, 40, 36)


def table() -> Image.Image:
    """The picture, 1024 x 768."""
    canvas = Canvas(1024, 768, (0, 0, 0))
    _wall(canvas)
    _wood(canvas)
    _cup(canvas, 330, 452)
    _apple(canvas, 690, 410)
    _spoon(canvas)
    return canvas.finished()


def _wall(canvas: Canvas) -> None:
    canvas.polygon(rectangle(0, 0, 1024, EDGE), Shade((228, 220, 200), (186, 178, 160), "right"))
    pane = (255, 250, 228)
    for left, top in ((90, 20), (216, 20), (90, 150), (216, 150)):
        lean = [(left + x + (top + y) * 0.28, top + y) for x, y in ((0, 0), (108, 0), (108, 112), (0, 112))]
        canvas.soft(lean, pane, 5, 0.6)
    canvas.soft(rectangle(-40, EDGE - 14, 1064, EDGE + 20), SHADOW, 10, 0.4)


def _wood(canvas: Canvas) -> None:
    rng = random.Random(11)
    seams = (EDGE, 362, 404, 458, 528, 622, 768)
    for top, bottom in itertools.pairwise(seams):
        tone = mix((178, 118, 68), (156, 98, 52), rng.random())
        canvas.polygon(rectangle(0, top, 1024, bottom), Shade(mix(tone, WHITE, 0.1), mix(tone, BLACK, 0.03)))
        for _ in range(12):  # grain
            x, y, length = rng.uniform(-300, 900), rng.uniform(top + 3, bottom - 3), rng.uniform(150, 800)
            dark = mix(tone, (84, 44, 16), rng.uniform(0.1, 0.35))
            canvas.line([(x, y), (x + length, y)], dark, rng.choice((0.7, 1.0, 1.4)))
        canvas.line([(0, bottom), (1024, bottom)], mix(tone, BLACK, 0.5), 2.2)
    canvas.polygon(rectangle(0, EDGE, 1024, EDGE + 4), (206, 154, 104))


def _cup(canvas: Canvas, x: float, y: float) -> None:
    canvas.soft(oval(x + 46, y + 98, 190, 46), SHADOW, 14, 0.6)
    canvas.polygon(oval(x, y + 86, 182, 58), mix(CHINA, BLACK, 0.28))  # saucer
    canvas.polygon(oval(x, y + 80, 182, 57), Shade(WHITE, mix(CHINA, BLACK, 0.14), "right"))
    canvas.polygon(oval(x, y + 80, 170, 51), BLUE)
    canvas.polygon(oval(x, y + 80, 165, 49), Shade(mix(CHINA, BLACK, 0.04), WHITE))
    canvas.polygon(oval(x, y + 82, 108, 30), Shade(mix(CHINA, BLACK, 0.14), mix(CHINA, BLACK, 0.03)))
    canvas.soft(oval(x + 22, y + 84, 92, 24), (70, 70, 90), 8, 0.5)
    handle = [arc(x + 118, y - 34, rx, ry, -100, 105, 14) for rx, ry in ((62, 54), (42, 36))]
    canvas.polygon([*handle[0], *reversed(handle[1])], Shade(WHITE, mix(CHINA, (90, 100, 120), 0.5), "right"))
    body = _cup_body(x, y)
    canvas.polygon(body, Shade(WHITE, mix(CHINA, (90, 100, 120), 0.45), "right"))
    with canvas.inside(body):
        canvas.soft(oval(x - 62, y - 20, 22, 90), WHITE, 12, 0.9)
        canvas.soft(oval(x + 30, y + 96, 90, 30), (80, 84, 110), 16, 0.45)
        for top, width in ((-34, 9), (-18, 3)):
            band = arc(x, y + top - 30, 130, 32, 0, 180)
            canvas.line(band, BLUE, width)
    canvas.polygon(oval(x, y - 86, 128, 36), Shade(WHITE, mix(CHINA, BLACK, 0.12), "right"))
    canvas.polygon(oval(x, y - 85, 120, 31), Shade(mix(CHINA, BLACK, 0.34), mix(CHINA, BLACK, 0.1)))
    coffee = oval(x, y - 76, 108, 23)
    with canvas.inside(oval(x, y - 85, 120, 31)):
        canvas.polygon(coffee, (206, 160, 108))
        canvas.polygon(oval(x, y - 75, 102, 20), Shade((58, 30, 16), (104, 60, 32), "right"))
        canvas.soft(oval(x - 44, y - 80, 28, 6, -8), (236, 214, 184), 5, 0.7)


def _cup_body(x: float, y: float) -> list[Point]:
    right = [(128, -86), (126, -50), (118, -10), (102, 30), (80, 62), (58, 78)]
    rim = arc(x, y + 78, 58, 13, 0, 180)
    return [*[(x + dx, y + dy) for dx, dy in right], *rim, *[(x - dx, y + dy) for dx, dy in reversed(right)]]


def _apple(canvas: Canvas, x: float, y: float) -> None:
    canvas.soft(oval(x + 52, y + 112, 130, 34), SHADOW, 14, 0.65)
    canvas.soft(oval(x + 10, y + 114, 70, 16), SHADOW, 6, 0.7)
    half = [(0, -84), (38, -104), (86, -94), (116, -44), (112, 20), (84, 80), (48, 112), (20, 114), (0, 106)]
    body = smooth([*[(x + a, y + b) for a, b in half], *[(x - a, y + b) for a, b in reversed(half[1:-1])]])
    canvas.polygon(body, Shade(mix(RED, (255, 120, 80), 0.55), mix(RED, (60, 0, 10), 0.55), "out", 0.36, 0.3))
    with canvas.inside(body):
        rng = random.Random(3)
        canvas.soft(oval(x - 30, y + 96, 90, 34), (250, 190, 80), 26, 0.45)
        canvas.soft(oval(x + 96, y + 50, 30, 80), (70, 0, 14), 22, 0.5)
        for _ in range(44):
            turn, reach = rng.uniform(0, 6.28), rng.uniform(0.25, 0.95)
            cx, cy = x + math.cos(turn) * 112 * reach, y + math.sin(turn) * 106 * reach
            canvas.polygon(oval(cx, cy, 1.3, 1.1), (236, 142, 96))
        canvas.soft(oval(x, y - 86, 46, 15), (90, 20, 10), 8, 0.75)
        canvas.soft(oval(x - 56, y - 42, 18, 34, 28), WHITE, 7, 0.85)
    stem = [(x - 5, y - 82), (x + 5, y - 80), (x + 14, y - 116), (x + 28, y - 140), (x + 17, y - 144), (x + 4, y - 118)]
    canvas.polygon(stem, Shade((120, 78, 42), (72, 42, 22)))
    outline = [(12, -112), (40, -142), (84, -148), (118, -130), (84, -110), (42, -104)]
    leaf = [(x + a, y + b) for a, b in outline]
    canvas.polygon(smooth(leaf), Shade((132, 176, 74), (62, 112, 48), "right"))
    canvas.line([(x + 16, y - 113), (x + 50, y - 124), (x + 84, y - 130), (x + 112, y - 130)], (176, 206, 120), 2)


def _spoon(canvas: Canvas) -> None:
    def put(points: Sequence[Point], down: float = 0.0) -> list[Point]:
        return [turned((560 + a, 662 + b + down), (560, 662), -9) for a, b in points]

    half = [(-232, -30), (-186, -43), (-140, -34), (-108, -12)]
    bowl = [(-250, 0), *half, *[(a, -b) for a, b in reversed(half)]]
    handle = [(-122, -12), (-92, -6), (40, -6), (150, -10), (214, -15), (236, -8)]
    neck = [*handle, *[(a, -b) for a, b in reversed(handle)]]
    for shape in (smooth(bowl), neck):
        canvas.soft(put(shape, 12), SHADOW, 6, 0.75)
    steel, bright, deep = (176, 182, 190), (240, 243, 247), (104, 110, 122)
    canvas.polygon(put(neck), Shade(bright, deep))
    canvas.line(put([(-100, -2), (40, -2), (150, -4), (224, -6)]), WHITE, 2)
    canvas.polygon(put(smooth(bowl)), Shade(bright, steel, "right"))
    inner = smooth([(-180 + (a + 180) * 0.87, b * 0.84) for a, b in bowl])
    canvas.polygon(put(inner), Shade(deep, (216, 221, 228)))
    with canvas.inside(put(inner)):
        canvas.soft(put(oval(-196, 20, 40, 10)), WHITE, 6, 0.9)
        canvas.soft(put(oval(-150, -22, 50, 9)), (70, 74, 86), 7, 0.6)
