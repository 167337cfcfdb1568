"""Sizes of a recipe's sources before they are fetched: by their lock, their local folder, or the Hub's list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource
from lora_fuse.hub.client import is_offline
from lora_fuse.hub.repository import RepositoryListing, list_repository
from lora_fuse.hub.sources import ExpectedFile, open_folder, refuse_missing
from lora_fuse.recipe import Lock, Source, hf_cache

Choose = Callable[[Iterable[str]], list[str]]  # names of a source to names of the files that are taken
List = Callable[[str, str | None], RepositoryListing]


@dataclass(frozen=True, slots=True)
class SourceSize:
    """The files of a source that a lock takes, and those of them that are still to be fetched."""

    label: str  # the source, with its commit if that is known
    root: Path  # folder of the files, whether they are there yet or not
    sizes: Mapping[str, int]  # bytes by POSIX path
    missing: frozenset[str]  # paths that are not on this machine
    known_by: str  # the authority for the sizes: the folder, the lock, or the Hub's list

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    @property
    def to_fetch(self) -> int:
        """Bytes that are not on this machine."""
        return sum(self.sizes[name] for name in self.missing)

    @property
    def weights(self) -> dict[str, list[str]]:
        """The safetensors files of each component."""
        names = sorted(filter(repository_files.is_weights, self.sizes))
        return {folder: list(below) for folder, below in groupby(names, lambda name: PurePosixPath(name).parts[0])}

    def fused(self, named: Iterable[str | None]) -> int:
        """Bytes in the folders of components to fuse, of which None is the main one."""
        main = repository_files.main_component({PurePosixPath(name).parts[0] for name in self.sizes})
        folders = {component or main for component in named}
        return sum(size for name, size in self.sizes.items() if PurePosixPath(name).parent.as_posix() in folders)


def base_size(source: Source, lock: Lock | None, *, timeout: float, once: bool = False) -> SourceSize:
    """Size of a pipeline: at most what `lock_base` takes.

    Before `model_index.json` is here, every folder with files of a component counts as one.

    Args:
        source: the base.
        lock: its last lock; one of another source or revision is ignored.
        timeout: seconds that the Hub may take for an answer.
        once: ask a Hub in trouble no second time.

    Raises:
        BadSource: the size cannot be known: the Hub has no such repository or may not be asked, the folder is not
            there, or there is no pipeline in it.
    """
    return _size(source, lock, _pipeline_files, partial(list_repository, timeout=timeout, once=once))


def lora_size(source: Source, filename: str, lock: Lock | None, *, timeout: float, once: bool = False) -> SourceSize:
    """Size of what `lock_lora` takes; the arguments are as there and for `base_size`.

    Raises:
        BadLora: see `lora_fuse.checkpoint.repository_files.lora_files`.
        BadSource: see `base_size`; also if there is no such file.
    """
    name = PurePosixPath(filename).as_posix()
    known = lock if lock is not None and lock.is_of(name) else None
    choose = partial(repository_files.lora_files, name, label=source.label)
    return _size(source, known, choose, partial(list_repository, timeout=timeout, once=once))


def _size(source: Source, lock: Lock | None, choose: Choose, list_files: List) -> SourceSize:
    if source.repo_id is None:
        folder = open_folder(Path(str(source.path)))
        return _of_list(source.label, Path(folder.label), folder.files, choose, "the folder")
    if lock is not None and (lock.repo_id, lock.requested) == (source.repo_id, source.revision):
        root = hf_cache.snapshot_folder(source.repo_id, str(lock.revision))
        sizes = {name: record.size for name, record in lock.files.items()}
        known = SourceSize(lock.label, root, sizes, _missing(root, sizes), "the lock")
        if known.missing and not is_offline():  # the locked commit may be gone, or gated by now
            list_files(source.repo_id, lock.revision)
        return known
    if is_offline():
        raise BadSource(
            f"{source.label} is not locked yet, and HF_HUB_OFFLINE is set: its size is unknown; unset it once"
        )
    commit, _, files = list_files(source.repo_id, source.revision)
    root = hf_cache.snapshot_folder(source.repo_id, commit)
    return _of_list(f"{source.repo_id}@{commit}", root, files, choose, "the Hub's list")


def _of_list(label: str, root: Path, files: Mapping[str, ExpectedFile], choose: Choose, known_by: str) -> SourceSize:
    names = choose(files)
    refuse_missing(names, files, label)
    sizes = {name: files[name].size or 0 for name in names}
    return SourceSize(label, root, sizes, _missing(root, sizes), known_by)


def _missing(root: Path, sizes: Mapping[str, int]) -> frozenset[str]:
    return frozenset(
        name for name, size in sizes.items() if not (root / name).is_file() or (root / name).stat().st_size != size
    )


def _pipeline_files(listed: Iterable[str]) -> list[str]:
    names = set(listed)
    if repository_files.MODEL_INDEX not in names:
        raise BadSource(f"there is no {repository_files.MODEL_INDEX}: it is no diffusers pipeline; name one that is")
    main = repository_files.main_component({PurePosixPath(name).parts[0] for name in names})
    found = repository_files.sort_files(names, main, label="the repository", read=lambda _: None, fail=BadSource)
    return [*found.shards, *found.others]
