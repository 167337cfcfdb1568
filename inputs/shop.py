"""A shop front whose sign reads OPEN."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from inputs.canvas import Canvas, Color, Point, Shade, arc, mix, oval, rectangle, rounded, smooth

if TYPE_CHECKING:
    from PIL import Image

WOOD: Color = (38, 84, 78)
DARK: Color = (23, 54, 52)
CREAM: Color = (247, 238, 215)
RED: Color = (198, 67, 55)
BRASS: Color = (205, 164, 84)
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)


def shop() -> Image.Image:
    """The picture, 1024 x 768."""
    canvas = Canvas(1024, 768, (176, 104, 82))
    _bricks(canvas)
    _pavement(canvas)
    canvas.soft(rectangle(70, 120, 990, 690), BLACK, 14, 0.35)
    canvas.polygon(rectangle(80, 110, 944, 690), Shade(WOOD, mix(WOOD, BLACK, 0.2)))
    _window(canvas)
    _door(canvas)
    _pillars(canvas)
    _awning(canvas)
    _sign(canvas)
    for x, flower in ((118, (232, 120, 140)), (906, (246, 205, 96))):
        _plant(canvas, x, flower)
    return canvas.finished()


def _bricks(canvas: Canvas) -> None:
    rng = random.Random(5)
    mortar = (206, 178, 158)
    canvas.polygon(rectangle(0, 0, 1024, 690), mortar)
    for row in range(35):
        for column in range(-1, 19):
            left, top = column * 58 + (row % 2) * 29, row * 20
            tone = mix((172, 92, 70), (194, 118, 92), rng.random())
            canvas.polygon(rectangle(left, top, left + 55, top + 17), tone)


def _pavement(canvas: Canvas) -> None:
    canvas.polygon(rectangle(0, 690, 1024, 768), Shade((176, 172, 168), (146, 142, 140)))
    seam = (128, 124, 122)
    canvas.line([(0, 722), (1024, 722)], seam, 2)
    for x in range(-40, 1100, 96):
        canvas.line([(512 + (x - 512) * 0.96, 690), (512 + (x - 512), 722)], seam, 2)
        canvas.line([(512 + (x + 48 - 512), 722), (512 + (x + 48 - 512) * 1.08, 768)], seam, 2)


def _window(canvas: Canvas) -> None:
    glass = rectangle(140, 270, 610, 590)
    canvas.polygon(rectangle(126, 256, 624, 604), DARK)
    canvas.polygon(glass, Shade((255, 226, 164), (222, 164, 98)))
    with canvas.inside(glass):
        for y in (440, 560):
            canvas.soft(rectangle(140, y + 6, 610, y + 30), (120, 70, 30), 6, 0.5)
            canvas.polygon(rectangle(140, y, 610, y + 14), Shade((150, 98, 56), (112, 70, 38)))
        for x in (190, 290, 390):
            _loaf(canvas, x, 440)
        for x in (480, 524, 568):
            _jar(canvas, x, 440)
        for x in (185, 235, 285):
            _jar(canvas, x, 560)
        for x in (360, 462, 560):
            _loaf(canvas, x, 560)
        for x in (250, 500):
            canvas.line([(x, 260), (x, 318)], (70, 56, 44), 3)
            canvas.soft(oval(x, 348, 70, 52), (255, 246, 205), 22, 0.8)
            canvas.polygon([(x - 34, 346), (x - 12, 314), (x + 12, 314), (x + 34, 346)], Shade(RED, (150, 42, 36)))
            canvas.polygon(oval(x, 347, 15, 8), (255, 250, 222))
        for left, width in ((150, 60), (236, 22), (452, 84)):
            canvas.soft(_slant(left, width, 600, 260), WHITE, 2, 0.16)
    canvas.polygon(rectangle(371, 270, 379, 590), DARK)
    canvas.polygon(rectangle(116, 600, 634, 616), Shade(mix(WOOD, WHITE, 0.25), WOOD))
    _panel(canvas, 140, 632, 368, 676)
    _panel(canvas, 382, 632, 610, 676)


def _slant(left: float, width: float, bottom: float, top: float) -> list[Point]:
    lean = (bottom - top) * 0.45
    return [(left, bottom), (left + width, bottom), (left + width + lean, top), (left + lean, top)]


def _loaf(canvas: Canvas, x: float, floor: float) -> None:
    body = [*arc(x, floor - 22, 44, 34, 180, 360), (x + 42, floor - 4), (x + 36, floor), (x - 36, floor)]
    canvas.polygon([*body, (x - 42, floor - 4)], Shade((226, 158, 82), (158, 88, 38)))
    for offset in (-20, 0, 20):
        canvas.line([(x + offset - 7, floor - 24), (x + offset + 7, floor - 46)], (250, 214, 156), 4)


def _jar(canvas: Canvas, x: float, floor: float) -> None:
    jam = ((176, 44, 58), (214, 120, 34), (120, 60, 120))[round(x) % 3]
    canvas.polygon(rounded(x - 17, floor - 52, x + 17, floor, 7), Shade(mix(jam, WHITE, 0.25), jam, "right"))
    canvas.polygon(rounded(x - 18, floor - 64, x + 18, floor - 49, 4), Shade(CREAM, BRASS, "right"))
    canvas.polygon(rounded(x - 12, floor - 36, x + 12, floor - 16, 2), CREAM)


def _panel(canvas: Canvas, left: float, top: float, right: float, bottom: float) -> None:
    canvas.polygon(rectangle(left, top, right, bottom), DARK)
    canvas.polygon(rectangle(left + 3, top + 3, right, bottom), mix(WOOD, WHITE, 0.22))
    canvas.polygon(rectangle(left + 3, top + 3, right - 3, bottom - 3), mix(WOOD, WHITE, 0.04))


def _door(canvas: Canvas) -> None:
    canvas.polygon(rectangle(664, 256, 884, 690), DARK)
    canvas.polygon(rectangle(680, 268, 868, 690), Shade(mix(RED, BLACK, 0.12), mix(RED, BLACK, 0.3)))
    glass = rounded(706, 292, 842, 520, 8)
    canvas.polygon(rounded(698, 284, 850, 528, 10), mix(RED, BLACK, 0.5))
    canvas.polygon(glass, Shade((246, 206, 142), (178, 128, 84)))
    with canvas.inside(glass):
        for left, width in ((690, 46), (760, 18)):
            canvas.soft(_slant(left, width, 530, 284), WHITE, 2, 0.2)
    canvas.line([(774, 292), (774, 520)], mix(RED, BLACK, 0.5), 6)
    canvas.line([(706, 406), (842, 406)], mix(RED, BLACK, 0.5), 6)
    for left, right in ((700, 768), (780, 848)):
        canvas.polygon(rectangle(left, 552, right, 664), mix(RED, BLACK, 0.45))
        canvas.polygon(rectangle(left + 3, 555, right, 664), mix(RED, WHITE, 0.12))
        canvas.polygon(rectangle(left + 3, 555, right - 3, 661), mix(RED, BLACK, 0.16))
    canvas.polygon(rounded(854, 450, 862, 516, 4), Shade(mix(BRASS, WHITE, 0.5), mix(BRASS, BLACK, 0.3), "right"))
    canvas.polygon(rectangle(652, 682, 896, 696), Shade((206, 202, 196), (160, 156, 150)))


def _pillars(canvas: Canvas) -> None:
    for x in (80, 634, 900):
        right = x + (30 if x == 634 else 44)
        canvas.polygon(rectangle(x, 230, right, 690), Shade(mix(WOOD, WHITE, 0.16), mix(WOOD, BLACK, 0.2), "right"))
        canvas.polygon(rectangle(x - 4, 664, right + 4, 690), Shade(WOOD, DARK))


def _awning(canvas: Canvas) -> None:
    top, bottom, left, right, stripes = 216, 292, 92, 932, 20
    canvas.soft(rectangle(left - 6, bottom, right + 6, bottom + 36), BLACK, 10, 0.55)
    for stripe in range(stripes):
        a, b = stripe / stripes, (stripe + 1) / stripes
        color = CREAM if stripe % 2 else RED
        outer = [left - 24 + (right - left + 48) * share for share in (a, b)]
        inner = [left + (right - left) * share for share in (a, b)]
        slope = [(inner[0], top), (inner[1], top), (outer[1], bottom), (outer[0], bottom)]
        canvas.polygon(slope, Shade(mix(color, WHITE, 0.12), mix(color, BLACK, 0.08)))
        middle, half = (outer[0] + outer[1]) / 2, (outer[1] - outer[0]) / 2
        flap = [(outer[0], bottom), *reversed(arc(middle, bottom + 6, half, 16, 0, 180)), (outer[1], bottom)]
        canvas.polygon(flap, mix(color, BLACK, 0.18))
    canvas.line([(left - 24, bottom), (right + 24, bottom)], mix(RED, BLACK, 0.45), 2)


def _sign(canvas: Canvas) -> None:
    canvas.polygon(rectangle(64, 84, 960, 104), Shade(mix(WOOD, WHITE, 0.3), WOOD))
    canvas.polygon(rectangle(72, 104, 952, 216), Shade(mix(WOOD, BLACK, 0.2), WOOD))
    canvas.polygon(rectangle(64, 208, 960, 220), Shade(mix(WOOD, WHITE, 0.25), DARK))
    canvas.soft(rounded(304, 100, 720, 212, 10), BLACK, 5, 0.5)
    canvas.polygon(rounded(300, 94, 724, 206, 10), BRASS)
    canvas.polygon(rounded(305, 99, 719, 201, 7), Shade(CREAM, mix(CREAM, BRASS, 0.2)))
    canvas.text((512, 150), "OPEN", 92, DARK, bold=2.6, space=16)


def _plant(canvas: Canvas, x: float, flower: Color) -> None:
    rng = random.Random(round(x))
    canvas.soft(oval(x + 6, 724, 50, 10), BLACK, 6, 0.5)
    for _ in range(70):
        cx, cy = _near(rng, x, 36), _near(rng, 618, 40)
        green = mix((40, 96, 50), (120, 170, 82), rng.random())
        leaf = smooth([(cx - 12, cy), (cx, cy - 7), (cx + 13, cy), (cx, cy + 7)], 6)
        canvas.polygon(leaf, green)
    for _ in range(12):
        cx, cy = _near(rng, x, 32), _near(rng, 608, 30)
        for turn in range(5):
            canvas.polygon(arc(cx, cy, 7, 7, 72 * turn - 30, 72 * turn + 30), flower)
            petal = arc(cx, cy, 4.5, 4.5, 72 * turn, 72 * turn + 1)[0]
            canvas.polygon(oval(*petal, 4, 4), flower)
        canvas.polygon(oval(cx, cy, 2.6, 2.6), (255, 240, 190))
    pot = [(x - 38, 660), (x + 38, 660), (x + 30, 724), (x - 30, 724)]
    canvas.polygon(pot, Shade((218, 130, 92), (150, 74, 50), "right"))
    canvas.polygon(rounded(x - 43, 650, x + 43, 668, 4), Shade((228, 142, 102), (162, 84, 58), "right"))


def _near(rng: random.Random, middle: float, reach: float) -> float:
    return middle + rng.triangular(-reach, reach, 0)
