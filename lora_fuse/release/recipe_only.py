"""A release without its weights: the recipe, from which whoever has base and LoRAs makes the same bytes.

Invariant: what is left out is in the list with its sha256, and the repository is smaller than `MOST`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import PublishRefused
from lora_fuse.hub import payload
from lora_fuse.machine import FileRecord
from lora_fuse.recipe import Manifest

MOST = 1_000_000  # bytes of a repository
SMALL = 64 << 10  # bytes of a file of the merge that goes along: configurations and licences, no vocabulary
PICTURES = MOST // 2  # bytes of all pictures
SIDES = (1024, 768, 640, 512, 384, 256)  # pixels of the longer side of a smaller copy
QUALITY = 75  # of its WebP


def left_out(manifest: Manifest, exports: Mapping[str, FileRecord]) -> frozenset[str]:
    """The files that a repository of a recipe has not: weights and large files of the merge, and all exports."""
    large = {name for name, file in manifest.files.items() if file.size > SMALL or repository_files.is_weights(name)}
    return frozenset(large | exports.keys())


def smaller_copies(pictures: Mapping[str, payload.Addition]) -> dict[str, bytes]:
    """Copies of pictures that together have at most `PICTURES` bytes, by the name of each in the repository.

    Empty if that is so already. The largest size is taken at which it is.

    Raises:
        PublishRefused: there are too many of them for any.
    """
    if sum(record.size for _, record in pictures.values()) <= PICTURES:
        return {}
    from lora_fuse.pictures import encode, picture  # a download is checked without Pillow

    shown = {name: picture.Picture(picture.read_levels(path)) for name, (path, _) in pictures.items()}
    for side in SIDES:
        copies = {name: encode.encoded(one, large=0, side=side, quality=QUALITY).data for name, one in shown.items()}
        if sum(map(len, copies.values())) <= PICTURES:
            return copies
    raise PublishRefused(
        f"{len(pictures)} pictures of {SIDES[-1]} pixels have more than {PICTURES} bytes, and a recipe is smaller than "
        f"{MOST}; publish the weights, publish.weights: full, or fewer cases"
    )


def copy_name(name: str) -> str:
    """The name of a smaller copy."""
    return PurePosixPath(name).with_suffix(".webp").as_posix()


def refuse_large(sizes: Collection[int]) -> None:
    """Refuse a repository of a recipe that is none, by the sizes of all its files in bytes.

    Raises:
        PublishRefused: it is too large.
    """
    if (size := sum(sizes)) > MOST:
        raise PublishRefused(
            f"without its weights the repository has {size} bytes, and a recipe is smaller than {MOST}; publish the "
            "weights, publish.weights: full"
        )
