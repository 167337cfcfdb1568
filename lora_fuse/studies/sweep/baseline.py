"""The base's own pictures, which every point of a sweep is compared with: made once, kept with their latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lora_fuse.errors import BadSource
from lora_fuse.machine.files import FileRecord, hash_file, replace_bytes, replace_text
from lora_fuse.pictures.metrics import to_levels, to_png
from lora_fuse.pictures.render import Case, Rendered
from lora_fuse.recipe.records import from_json, to_json
from lora_fuse.regression.case_judgement import picture_of
from lora_fuse.regression.verdicts import Picture
from lora_fuse.studies.sweep.points import waiting

RECORD = "baseline.json"


def baseline(folder: Path, cases: Sequence[Case], render: Callable[[], Sequence[Rendered]]) -> Mapping[str, Picture]:
    """The pictures in `folder`, by case; rendered if they are not there or not as they were.

    Args:
        folder: named after everything that they depend on.
        cases: what they are of.
        render: makes one for each case.
    """
    with waiting(folder):  # several processes need the same, and one makes it
        if (found := _read(folder, cases)) is not None:
            return found
        pictures = {case.name: picture_of(one) for case, one in zip(cases, render(), strict=True)}
        _write(folder, pictures)
        return pictures


def _read(folder: Path, cases: Sequence[Case]) -> dict[str, Picture] | None:
    path = folder / RECORD
    try:
        files = from_json(dict[str, FileRecord], path.read_text(encoding="utf-8"), str(path))
        if any(hash_file(folder / name) != record for name, record in files.items()):
            return None
        return {case.name: _read_picture(folder, case.name) for case in cases}
    except (OSError, BadSource):
        return None


def _read_picture(folder: Path, case: str) -> Picture:
    with np.load(folder / f"{case}.npz") as arrays:
        latents, nonfinite, sigmas = arrays["latents"], int(arrays["nonfinite"]), tuple(arrays["sigmas"].tolist())
    with Image.open(folder / f"{case}.png") as image:
        return Picture(to_levels(image), nonfinite, latents, sigmas)


def _write(folder: Path, pictures: Mapping[str, Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case, picture in pictures.items():
        replace_bytes(folder / f"{case}.png", to_png(picture.levels))
        np.savez(
            folder / f"{case}.npz",
            latents=np.asarray(picture.latents),
            nonfinite=picture.nonfinite,
            sigmas=np.asarray(picture.sigmas),
        )
    names = [f"{case}.{kind}" for case in pictures for kind in ("npz", "png")]
    replace_text(folder / RECORD, to_json({name: hash_file(folder / name) for name in names}))
