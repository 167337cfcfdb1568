"""What fetching a base or a LoRA will take, before any of it is fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource
from lora_fuse.hub.client import is_offline
from lora_fuse.hub.repository import listing as listing  # noqa: PLC0414
from lora_fuse.hub.repository import open_repository
from lora_fuse.hub.sources import ExpectedFile, open_folder
from lora_fuse.recipe import Lock, Source, hf_cache, sections


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of each file by POSIX path, and how many of all bytes are not on this machine yet."""

    files: Mapping[str, int]
    to_fetch: int = 0

    def below(self, component: str) -> int:
        """Bytes in one component's folder."""
        return sum(size for name, size in self.files.items() if PurePosixPath(name).parent.as_posix() == component)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def base_sizes(source: Source, previous: Lock | None, transfer: sections.DownloadParams) -> Sizes:
    """At most what `lock_base` will take: also files of folders that the pipeline turns out not to name.

    Raises:
        BadSource: there is no such repository, revision or folder.
    """
    return _sizes(source, previous, transfer, lambda names, _: filter(_may_be_taken, names))


def lora_sizes(source: Source, filename: str, previous: Lock | None, transfer: sections.DownloadParams) -> Sizes:
    """What `lock_lora` will take.

    Raises:
        BadSource: there is no such repository, revision or folder.
        BadLora: it is no LoRA.
    """
    known = previous if previous is not None and previous.lora_name == PurePosixPath(filename).as_posix() else None
    return _sizes(source, known, transfer, lambda names, label: repository_files.lora_files(filename, names, label))


def _may_be_taken(name: str) -> bool:
    path = PurePosixPath(name)
    in_component = len(path.parts) == 2 and (
        path.suffix in repository_files.TEXT_SUFFIXES or repository_files.is_plain_weights(path.name)
    )
    return name == repository_files.MODEL_INDEX or in_component


def _sizes(
    source: Source,
    previous: Lock | None,
    transfer: sections.DownloadParams,
    choose: Callable[[Iterable[str], str], Iterable[str]],
) -> Sizes:
    if source.repo_id is None:
        shelf = open_folder(Path(str(source.path)))
        return Sizes(_chosen(shelf.files, choose(shelf.files, shelf.label)))
    if previous is not None and _is_here(previous):
        return Sizes({name: record.size for name, record in previous.files.items()})
    if is_offline():  # what is not here cannot be had: locking it says so
        return Sizes({})
    with open_repository(source.repo_id, previous.revision if previous else source.revision, transfer) as repository:
        files, cache = repository.files, hf_cache.snapshot_folder(source.repo_id, repository.commit)
        sizes = _chosen(files, choose(files, repository.label))
    return Sizes(sizes, sum(size for name, size in sizes.items() if not (cache / name).is_file()))


def _chosen(files: Mapping[str, ExpectedFile], names: Iterable[str]) -> dict[str, int]:
    """Bytes of those that are there; that one is not is said when it is to be locked."""
    return {name: files[name].size or 0 for name in names if name in files}


def _is_here(lock: Lock) -> bool:
    try:
        hf_cache.locate(lock)
    except BadSource:
        return False
    return True
