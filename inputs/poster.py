"""A travel poster: mountains above a lake."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from inputs.canvas import Canvas, Color, Shade, mix, oval, rectangle

if TYPE_CHECKING:
    from PIL import Image

PAPER: Color = (248, 240, 222)
NAVY: Color = (26, 44, 74)
ORANGE: Color = (240, 138, 66)
WHITE: Color = (255, 255, 255)
LEFT, TOP, RIGHT, SHORE, BOTTOM = 44, 44, 724, 660, 850


def poster() -> Image.Image:
    """The picture, 768 x 1024."""
    canvas = Canvas(768, 1024, PAPER)
    with canvas.inside(rectangle(LEFT, TOP, RIGHT, BOTTOM)):
        _sky(canvas)
        _ridge(canvas, 2, 430, 120, Shade((176, 150, 176), (222, 170, 150)))
        _peak(canvas)
        _ridge(canvas, 8, 560, 70, Shade((64, 92, 122), (92, 122, 138)))
        _lake(canvas)
        _forest(canvas)
        _boat(canvas, 470, 752)
    canvas.text((384, 908), "THE LAKE", 84, NAVY, bold=2.2, space=12)
    canvas.line([(140, 972), (628, 972)], ORANGE, 4)
    return canvas.finished()


def _sky(canvas: Canvas) -> None:
    canvas.polygon(rectangle(LEFT, TOP, RIGHT, SHORE), Shade((70, 142, 168), (252, 214, 158)))
    for radius, share in ((150, 0.25), (120, 0.5)):
        canvas.soft(oval(545, 232, radius, radius), mix(ORANGE, WHITE, 0.7), 3, share)
    canvas.polygon(oval(545, 232, 88, 88), mix(ORANGE, WHITE, 0.86))
    for x, y, wide in ((170, 150, 110), (250, 182, 80), (640, 336, 90), (120, 330, 70)):
        canvas.polygon(oval(x, y, wide, 9), mix(PAPER, (250, 214, 170), 0.4))


def _ridge(canvas: Canvas, seed: int, level: float, rise: float, fill: Shade) -> None:
    rng = random.Random(seed)
    points, x = [(0.0, float(SHORE))], 0.0
    while x < 768:
        points.append((x, level - rng.uniform(0, rise)))
        x += rng.uniform(26, 62)
    canvas.polygon([*points, (768.0, level), (768.0, float(SHORE))], fill)


def _peak(canvas: Canvas) -> None:
    top, ledge, low, right = (318, 190), (430, 318), (690, 620), [(690, 620), (560, 470), (500, 420)]
    left = [(250, 292), (214, 322), (130, 452), (30, 620), low]
    middle = [(352, 250), (338, 300), (376, 372), (362, 440), (410, 520), (400, 620)]
    canvas.polygon([top, *left, *right, ledge], Shade((72, 86, 128), (96, 112, 146)))
    canvas.polygon([top, *middle, *right, ledge], Shade((150, 134, 158), (176, 146, 150)))  # in the sun
    lit = [(452, 350), (420, 340), (404, 372), (386, 344), (366, 384), (352, 352), (336, 392)]
    shaded = [(318, 350), (292, 396), (284, 346), (254, 376), (262, 336), (232, 340), (250, 292)]
    canvas.polygon([top, ledge, *lit, *shaded], (250, 246, 240))
    canvas.polygon([top, *reversed(shaded), (336, 392), (345, 366), (338, 300), (352, 250)], (178, 194, 220))


def _lake(canvas: Canvas) -> None:
    rng = random.Random(4)
    canvas.polygon(rectangle(LEFT, SHORE, RIGHT, BOTTOM), Shade((236, 190, 150), (36, 92, 124)))
    for row in range(26):
        y = SHORE + 8 + row * 7
        for _ in range(5):
            x, wide = rng.uniform(LEFT, RIGHT), rng.uniform(16, 50 + row * 3)
            tone = mix((250, 222, 178), (60, 122, 150), min(1.0, row / 20 + rng.uniform(-0.1, 0.2)))
            canvas.polygon(oval(x, y, wide, 1.6 + row * 0.06), tone)


def _forest(canvas: Canvas) -> None:
    rng = random.Random(9)
    for row, color in enumerate(((40, 82, 88), (24, 58, 66))):
        for x in range(30, 760, 19):
            bank = abs(x - 400) / 360
            size = (40 + 88 * bank**1.5) * rng.uniform(0.7, 1.15) - row * 10
            _tree(canvas, x + rng.uniform(-6, 6) + row * 9, SHORE + 4 + row * 6, size, color)
    canvas.polygon(rectangle(LEFT, SHORE - 6, RIGHT, SHORE + 12), (24, 58, 66))


def _tree(canvas: Canvas, x: float, foot: float, size: float, color: Color) -> None:
    for level in range(4):
        y, half = foot - size * 0.22 * level, size * (0.24 - 0.045 * level)
        canvas.polygon([(x - half, y), (x + half, y), (x, y - size * 0.36)], color)


def _boat(canvas: Canvas, x: float, y: float) -> None:
    canvas.polygon(oval(x, y + 24, 92, 8), (28, 76, 106))
    canvas.polygon([(x - 84, y), (x + 84, y), (x + 58, y + 24), (x - 58, y + 24)], Shade((196, 62, 50), (140, 38, 36)))
    canvas.polygon([(x - 84, y), (x + 84, y), (x + 80, y + 5), (x - 80, y + 5)], PAPER)
    canvas.line([(x - 6, y), (x - 6, y - 128)], NAVY, 4)
    canvas.polygon([(x - 12, y - 12), (x - 12, y - 122), (x - 72, y - 12)], Shade(PAPER, mix(PAPER, ORANGE, 0.3)))
    canvas.polygon([(x + 1, y - 12), (x + 1, y - 112), (x + 62, y - 12)], Shade(WHITE, PAPER))
