"""How much the LoRAs change each block, as a small picture for the model card. Pure: numbers in, a PNG out.

A PNG and no SVG: the Hub shows it wherever it shows pictures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (720, 180)  # pixels
LEFT, TOP, BOTTOM = 64, 16, 28  # margins in pixels
INK, BAR, GRID, PAPER = "#1f2328", "#3b6ea5", "#d0d7de", "#ffffff"
LABELS = 16  # names below the bars, at most


def block_plot(blocks: Sequence[tuple[str, float]]) -> bytes:
    """A bar for each block.

    Args:
        blocks: name and relative norm (not negative) in the order of the model; at least one.
    """
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    width, floor = SIZE[0] - LEFT - 8, SIZE[1] - BOTTOM
    top = max(norm for _, norm in blocks) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = floor - share * (floor - TOP)
        draw.line([(LEFT, y), (SIZE[0] - 8, y)], fill=GRID)
        draw.text((LEFT - 6, y), f"{share * top:.3g}", fill=INK, font=font, anchor="rm")
    step = width / len(blocks)
    every = -(-len(blocks) // LABELS)
    for index, (name, norm) in enumerate(blocks):
        left, right = LEFT + index * step, LEFT + (index + 1) * step
        gap = min(step * 0.15, 6)
        draw.rectangle([left + gap, floor - norm / top * (floor - TOP), right - gap, floor], fill=BAR)
        if index % every == 0:
            draw.text(((left + right) / 2, floor + 5), name, fill=INK, font=font, anchor="ma")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
