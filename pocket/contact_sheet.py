"""The contact sheet: for one instruction of each kind, what the base makes in 40 and 4 steps, and the merged in 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from pocket import tasks
from pocket.bench import FEW, MANY, MERGED, Bench
from pocket.model import SIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADS = ("input", "40 steps", "4 steps, no LoRA", "4 steps, merged")
GAP, LINE, ACROSS = 6, 20, 2


def contact_sheet(made_by: Bench) -> Image.Image:
    """The drawn rabbit, then the first held-out scene of every other kind of instruction."""
    first = {task.kind: task for task in reversed(tasks.held_out(100))}
    chosen = [tasks.rabbit(), *(task for kind, task in sorted(first.items()) if kind != "coat")]
    chosen.append(first["coat"])
    columns = [[task.images[0] for task in chosen], *(made_by.pictures(s, chosen) for s in (MANY, FEW, MERGED))]
    return _sheet([task.prompt for task in chosen], list(zip(*columns, strict=True)))


def _sheet(prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    cell, font = SIDE + GAP, ImageFont.load_default(14)
    block, height = len(HEADS) * cell + 2 * GAP, SIDE + LINE + GAP
    down = -(-len(rows) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * block - GAP, LINE + down * height), "white")
    pen = ImageDraw.Draw(sheet)
    for across in range(ACROSS):
        for column, head in enumerate(HEADS):
            pen.text((GAP + across * block + column * cell, 2), head, fill="gray", font=font)
    for number, (prompt, pictures) in enumerate(zip(prompts, rows, strict=True)):
        left, top = GAP + number // down * block, LINE + number % down * height
        pen.text((left, top + 1), prompt, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * cell, top + LINE))
    return sheet
