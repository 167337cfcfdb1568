"""Bar chart of the change of each block, for the model card. Pure: numbers in, a PNG out.

A PNG and no SVG: the Hub shows it wherever it shows pictures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (720, 180)  # pixels
# Margins in pixels.
LEFT = 64
TOP = 16
BOTTOM = 28
INK = "#1f2328"
BAR = "#3b6ea5"
GRID = "#d0d7de"


def block_plot(blocks: Sequence[tuple[str, float]]) -> bytes:
    """Draw a bar for each of one block or more, given by name and relative norm (not negative), as a PNG."""
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    floor = SIZE[1] - BOTTOM
    top = max(norm for _, norm in blocks) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = floor - share * (floor - TOP)
        draw.line([(LEFT, y), (SIZE[0] - 8, y)], fill=GRID)
        draw.text((LEFT - 6, y), f"{share * top:.3g}", fill=INK, font=font, anchor="rm")
    step = (SIZE[0] - LEFT - 8) / len(blocks)
    every = -(-len(blocks) // 16)  # so that there are at most 16 names below the bars
    for index, (name, norm) in enumerate(blocks):
        left = LEFT + index * step
        right = left + step
        gap = min(step * 0.15, 6)
        draw.rectangle([left + gap, floor - norm / top * (floor - TOP), right - gap, floor], fill=BAR)
        if index % every == 0:
            draw.text(((left + right) / 2, floor + 5), name, fill=INK, font=font, anchor="ma")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
