"""The weights of a component that a library would load, among all the sets that lie in its folder. Pure.

A folder may hold the same weights several times: whole and in shards, plain and as a variant (fp16, non_ema). What is
chosen is what `from_pretrained` loads: the plain set before a variant; of several plain ones, `CANONICAL` decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lora_fuse.checkpoint.file_roles import Role, role_of

# diffusers looks for an index first, `ModelMixin.from_pretrained`; transformers for one file, `PreTrainedModel`.
CANONICAL = (
    ("diffusion_pytorch_model", True),
    ("diffusion_pytorch_model", False),
    ("model", False),
    ("model", True),
)
_PART = re.compile(r"-\d+-of-(\d+)$")
_FORMAT = frozenset({"safetensors", "sft", "index", "json"})


@dataclass(frozen=True, slots=True)
class FileListing:
    """The files of a folder or repository by POSIX path, wherever it is.

    `read` gives the content of a JSON file, None where it is not known yet; `fail` makes the error of a refusal.
    """

    label: str
    names: frozenset[str]
    read: Callable[[str], object]
    fail: Callable[[str], Exception]

    def place(self, folder: str) -> str:
        """One of its folders, in words; ``""`` is the whole."""
        return f"{folder}/ of {self.label}" if folder else self.label


@dataclass(frozen=True, slots=True)
class WeightSet:
    """Weights that belong together: safetensors files and their index, if there is one; `variant` as in diffusers."""

    files: tuple[str, ...]
    index: str | None
    variant: str | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file or an index, with what its name says: ``STEM.VARIANT-00001-of-00002.safetensors`` and the like."""

    path: str
    stem: str
    variant: str | None
    is_index: bool
    is_part: bool


def choose_weights(listing: FileListing, folder: str, paths: Sequence[str], prefer: str | None) -> WeightSet | None:
    """The set to load of a folder's safetensors files and indexes, which are `paths`; None if there are no files.

    `prefer` is a variant that is taken before the plain set: that of the component to fuse, if it has no plain one.

    Raises:
        listing.fail: there are several sets and none of them is what a library would load, or an index is no good.
    """
    entries = [_parse(path) for path in paths]
    files = [entry for entry in entries if not entry.is_index]
    if not files:
        return None
    heads = [entry for entry in entries if entry.is_index or not entry.is_part]
    variants = {entry.variant for entry in heads}
    variant = next((known for known in (prefer, None) if known in variants), None)
    if None not in variants and variant is None:
        if len(variants) > 1:
            names = ", ".join(sorted(map(str, variants)))
            raise listing.fail(f"{listing.place(folder)} has weights only as the variants {names}; keep one of them")
        variant = next(iter(variants), None)
    head = _head(listing, folder, [entry for entry in heads if entry.variant == variant], files)
    if not head.is_index:
        return WeightSet((head.path,), None, variant)
    if (content := listing.read(head.path)) is None:  # at most these
        return WeightSet(tuple(entry.path for entry in files if entry.variant == variant), head.path, variant)
    return WeightSet(tuple(_shards(listing, head.path, content)), head.path, variant)


def _head(listing: FileListing, folder: str, heads: Sequence[_Entry], files: Sequence[_Entry]) -> _Entry:
    """The index or the one file that stands for the set to load."""
    for name in CANONICAL:
        if (found := next((entry for entry in heads if (entry.stem, entry.is_index) == name), None)) is not None:
            return found
    contents = {entry.path: listing.read(entry.path) for entry in heads if entry.is_index}
    known = {index: content for index, content in contents.items() if content is not None}
    shards = {shard for index, content in known.items() for shard in _shards(listing, index, content)}
    left = [entry for entry in heads if entry.path not in shards]
    if len(left) == 1:
        return left[0]
    indexes = f"{len(contents)} indexes" if contents else "no index"
    raise listing.fail(
        f"{listing.place(folder)} has {len(files)} safetensors files and {indexes} ({files[0].path}, …); "
        "keep one, or add the index"
    )


def _shards(listing: FileListing, index: str, content: object) -> list[str]:
    """The shards that an index names, each beside it."""
    where = f"{index} of {listing.label}"
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise listing.fail(f"{where} is no shard index: it has no weight_map; get a good copy")
    shards = []
    for filename in sorted(set(map(str, weight_map.values()))):
        if PurePosixPath(filename).name != filename or role_of(filename).role is not Role.WEIGHTS:
            what = "a pickle" if role_of(filename).role is Role.PICKLE else "not a safetensors file beside it"
            raise listing.fail(f"{where} names {filename!r}, which is {what}; it cannot be taken")
        shard = (PurePosixPath(index).parent / filename).as_posix()
        if shard not in listing.names:
            raise listing.fail(f"{listing.label} has no {shard}, which its {index} names; get a complete copy")
        shards.append(shard)
    return shards


def _parse(path: str) -> _Entry:
    stem, *rest = PurePosixPath(path).name.split(".")
    words = [stem, *(word for word in rest if word.lower() not in _FORMAT)]
    parts = [int(found[1]) for word in words if (found := _PART.search(word))]
    variant = ".".join(_PART.sub("", word) for word in words[1:])
    is_index = role_of(path).role is Role.INDEX
    return _Entry(path, _PART.sub("", stem), variant or None, is_index, max(parts, default=1) > 1)
