"""The drawn input pictures: a rabbit to edit, and a bear in a hat as the second picture of a two-picture edit."""

from __future__ import annotations

from pathlib import Path

from pocket.scenes import Scene, draw

SIDE = 256  # pixels

DRAWINGS = {
    "rabbit.png": Scene("rabbit", "white", "blue", x=0.5, y=0.52, size=1.0),
    "hat.png": Scene("bear", "brown", "yellow", x=0.5, y=0.52, size=1.0, hat="red"),
}


def draw_inputs(folder: Path) -> None:
    """Write every drawing into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in DRAWINGS.items():
        draw(scene, SIDE).save(folder / name, optimize=True)
