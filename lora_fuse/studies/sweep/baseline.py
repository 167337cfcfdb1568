"""The base's own pictures, which every point of a sweep is compared with: made once, kept with their latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_fuse.errors import BadSource
from lora_fuse.machine import FileRecord, files
from lora_fuse.pictures import Case, picture
from lora_fuse.recipe import records
from lora_fuse.studies.sweep.points import waiting

RECORD = "baseline.json"


def baseline(
    folder: Path, cases: Sequence[Case], render: Callable[[], Sequence[picture.Rendered]]
) -> Mapping[str, picture.Picture]:
    """The pictures in `folder`, by case; rendered if they are not there or not as they were."""
    with waiting(folder):  # several processes need the same, and one makes it
        if (kept := _read(folder, cases)) is not None:
            return kept
        pictures = dict(zip((case.name for case in cases), render(), strict=True))
        _write(folder, pictures)
        return pictures


def _read(folder: Path, cases: Sequence[Case]) -> dict[str, picture.Picture] | None:
    path = folder / RECORD
    try:
        written = records.read(dict[str, FileRecord], path)
        if any(files.hash_file(folder / name) != record for name, record in written.items()):
            return None
        return {case.name: _read_picture(folder, case.name) for case in cases}
    except (OSError, BadSource):
        return None


def _read_picture(folder: Path, case: str) -> picture.Picture:
    with np.load(folder / f"{case}.npz") as arrays:
        latents = arrays["latents"]
        nonfinite = int(arrays["nonfinite"])
        sigmas = tuple(arrays["sigmas"].tolist())
    return picture.Picture(picture.read_levels(folder / f"{case}.png"), nonfinite, latents, sigmas)


def _write(folder: Path, pictures: Mapping[str, picture.Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case, made in pictures.items():
        files.replace_bytes(folder / f"{case}.png", made.png)
        np.savez(
            folder / f"{case}.npz",
            latents=np.asarray(made.latents),
            nonfinite=made.nonfinite,
            sigmas=np.asarray(made.sigmas),
        )
    names = [f"{case}.{kind}" for case in pictures for kind in ("npz", "png")]
    files.replace_text(folder / RECORD, records.to_json({name: files.hash_file(folder / name) for name in names}))
