"""The drawn input pictures: what each is called and who draws it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from inputs.engraving import engraving
from inputs.poster import poster
from inputs.shop import shop
from inputs.table import table

PICTURES = Path(__file__).parent / "pictures"

DRAWINGS: dict[str, Callable[[], Image.Image]] = {
    "engraving.png": engraving,
    "poster.png": poster,
    "shop.png": shop,
    "table.png": table,
}


def draw_inputs(folder: Path) -> None:
    """Write every drawing into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        drawing().save(folder / name, optimize=True)
