"""A base that was left as it is, with LoRAs beside it: every byte of the base, every factor, and every strength."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fuse.checkpoint import repository_files
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.verification.byte_comparison import pieces, same_bytes
from lora_fuse.verification.expectation import ExpectedDelta, read_expected
from lora_fuse.verification.weights import StoredTensor, Weights
from lora_fuse.verification.whole_files import compare_files

if TYPE_CHECKING:
    from lora_fuse.verification.rederivation import Expectation

FOLDER = "loras"
CLOSE = 1e-12  # of two ways to multiply alpha, rank and scale


def is_kept_beside(merged: Path) -> bool:
    """True for a folder with LoRAs in it that say that they were put there beside their base."""
    files = sorted((merged / FOLDER).glob("*.safetensors")) if merged.is_dir() else []
    return bool(files) and all("side_channel_of" in _provenance(path) for path in files)


def _provenance(path: Path) -> str:
    entries = next(iter(Weights([path]).metadata.values()))
    return entries.get("lora_fuse", "")


def compare_kept(
    merged: Path,
    base: Path,
    shards: repository_files.SortedFiles | None,
    stored: Weights,
    wanted: Mapping[str, Sequence[ExpectedDelta]],
    expected: Expectation,
    advance: Callable[[int], None],
) -> tuple[int, list[str]]:
    """Compare the folder with the base, whose tensors are `stored`, and with the deltas that are `wanted`.

    `shards` are a folder's files, sorted; `advance` is told the bytes of each file.

    Returns:
        The number of files that were compared with the base's, and what is wrong.

    Raises:
        BadCheckpoint, BadLora: something cannot be read.
    """
    held = sorted((merged / FOLDER).glob("*.safetensors"))
    names = {f"{FOLDER}/{path.name}" for path in held}
    there = read_expected([LoraInput(path.stem, path, 1.0) for path in held], stored, Selection())
    wrong = [*there.problems, *_differences(wanted, there.deltas)]
    if shards is not None:
        count, problems = compare_files(merged, base, names, shards, expected, advance, {})
        return count, problems + wrong
    others = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()} - names
    wrong += [f"{name} is not in the base" for name in sorted(others - {base.name})]
    wrong += [] if _are_same(merged / base.name, base) else [f"{base.name} differs from the base"]
    advance(base.stat().st_size)
    return 1, wrong


def _are_same(ours: Path, theirs: Path) -> bool:
    size = theirs.stat().st_size
    if not ours.is_file() or ours.stat().st_size != size:
        return False
    return all(same_bytes(ours, theirs, (start, start), nbytes) for start, nbytes in pieces(size))


def _differences(
    wanted: Mapping[str, Sequence[ExpectedDelta]], there: Mapping[str, Sequence[ExpectedDelta]]
) -> list[str]:
    problems = [f"{name} has a LoRA on one side only" for name in sorted(wanted.keys() ^ there.keys())]
    for name in sorted(wanted.keys() & there.keys()):
        sides = [sorted(map(_key, side[name])) for side in (wanted, there)]
        same = len(sides[0]) == len(sides[1]) and all(
            one[:-1] == other[:-1] and math.isclose(one[-1], other[-1], rel_tol=CLOSE)
            for one, other in zip(*sides, strict=True)
        )
        problems += [] if same else [f"{name}: the factors beside the base, or their strength, are not the LoRA's"]
    return problems


def _key(delta: ExpectedDelta) -> tuple[bytes, bytes, float]:
    """The bytes of both factors, and what their product is multiplied by."""
    up, down = (_bytes(delta.parts.get(side)) for side in ("up", "down"))
    return up, down, delta.factor * delta.scale


def _bytes(part: object) -> bytes:
    if not isinstance(part, StoredTensor):
        return b""
    return json.dumps([part.dtype, part.shape]).encode() + np.ascontiguousarray(part.read()).tobytes()
