"""Sizes of the sources of a recipe, and how much of them is here: by a lock, a folder, or the Hub's list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource
from lora_fuse.hub import client, sources
from lora_fuse.hub import sizes as hub_sizes
from lora_fuse.recipe import Lock, Source, hf_cache

PATIENCE = 10.0  # seconds that the Hub may take to answer
Choose = Callable[[Mapping[str, int]], list[str]]


@dataclass(frozen=True, slots=True)
class Stock:
    """The files of a source.

    Attributes:
        label: the source, with its commit if that is known.
        root: where the files are, or will be.
        sizes: bytes by POSIX path.
        missing: the paths that are not on this machine.
        known_by: who says so.
    """

    label: str
    root: Path
    sizes: Mapping[str, int]
    missing: frozenset[str]
    known_by: str

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(self.sizes.values())

    @property
    def to_fetch(self) -> int:
        """Bytes that are not here."""
        return sum(self.sizes[name] for name in self.missing)

    @property
    def weights(self) -> dict[str, list[str]]:
        """The safetensors files of each component."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.sizes):
            if name.endswith(".safetensors"):
                found.setdefault(PurePosixPath(name).parts[0], []).append(name)
        return found


def base_stock(source: Source, lock: Lock | None) -> Stock:
    """Of a pipeline; before it is here, its folders stand for the components, as its index cannot be read.

    Raises:
        BadSource: it cannot be known: it is not here, and the Hub does not say or may not be asked.
    """
    return _stock(source, lock, _pipeline)


def lora_stock(source: Source, filename: str, lock: Lock | None) -> Stock:
    """Of a LoRA.

    Raises:
        BadLora: see `lora_fuse.checkpoint.repository_files.lora_files`.
        BadSource: see `base_stock`.
    """
    name = PurePosixPath(filename).as_posix()
    if lock is not None and lock.lora_name != name:
        lock = None
    return _stock(source, lock, lambda sizes: repository_files.lora_files(name, sizes, source.label))


def _stock(source: Source, lock: Lock | None, choose: Choose) -> Stock:
    if source.repo_id is None:
        folder = sources.open_folder(Path(str(source.path)))
        sizes = {name: promise.size or 0 for name, promise in folder.files.items()}
        return Stock(source.label, folder.root, {n: sizes[n] for n in choose(sizes)}, frozenset(), "the folder")
    if lock is not None and (lock.repo_id, lock.requested) == (source.repo_id, source.revision):
        root = hf_cache.snapshot_folder(source.repo_id, str(lock.revision))
        sizes = {name: record.size for name, record in lock.files.items()}
        known = Stock(lock.label, root, sizes, _missing(root, sizes), "the lock")
        if known.missing and not client.is_offline():
            hub_sizes.listing(source.repo_id, lock.revision, PATIENCE)  # may it still be had?
        return known
    if client.is_offline():
        raise BadSource(
            f"{source.label} is not locked yet, and HF_HUB_OFFLINE is set: its size is unknown; unset it once"
        )
    commit, files = hub_sizes.listing(source.repo_id, source.revision, PATIENCE)
    sizes = {name: promise.size or 0 for name, promise in files.items()}
    sizes = {name: sizes[name] for name in choose(sizes)}
    root = hf_cache.snapshot_folder(source.repo_id, commit)
    return Stock(f"{source.repo_id}@{commit}", root, sizes, _missing(root, sizes), "the Hub's list")


def _missing(root: Path, sizes: Mapping[str, int]) -> frozenset[str]:
    return frozenset(
        name for name, size in sizes.items() if not (root / name).is_file() or (root / name).stat().st_size != size
    )


def _pipeline(sizes: Mapping[str, int]) -> list[str]:
    if repository_files.MODEL_INDEX not in sizes:
        raise BadSource(f"there is no {repository_files.MODEL_INDEX}: it is no diffusers pipeline; name one that is")
    folders = sorted({PurePosixPath(name).parts[0] for name in sizes if len(PurePosixPath(name).parts) > 1})
    found = [repository_files.MODEL_INDEX]
    for folder in folders:
        if repository_files.folder_files(folder, sizes):
            found += [*repository_files.text_files(folder, sizes, ""), *repository_files.plain_weights(folder, sizes)]
    return found
