"""The photograph of a person: the upper left of scikit-image's `astronaut.png`, its pixels unchanged."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

NAME = "astronaut.png"
SIDE = 480  # of 512 pixels: the file stays below 400 kB


def cut_photo(folder: Path) -> None:
    """Write the photograph into `folder`, from the installed scikit-image."""
    folder.mkdir(parents=True, exist_ok=True)
    with as_file(files("skimage") / "data" / NAME) as path, Image.open(path) as whole:
        whole.convert("RGB").crop((0, 0, SIDE, SIDE)).save(folder / NAME, optimize=True)
