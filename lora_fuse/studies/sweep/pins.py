"""Bases and LoRAs of a sweep, pinned: each is fetched, hashed and checked once, however many points have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lora_fuse import hub
from lora_fuse.hub import sizes as source_sizes
from lora_fuse.machine import file_state, files, progress, space
from lora_fuse.recipe import Lock, Source, hf_cache, paths, records, sections


@dataclass(frozen=True, slots=True)
class SweepLocks:
    """Everything that a sweep pinned."""

    schema: int
    locks: list[Lock]


class SourceLocks:
    """Locks as they are needed; a source that was pinned before keeps its commit."""

    def __init__(self, path: Path, known: Iterable[Lock], transfer: sections.DownloadParams) -> None:
        """`path` has the pins of earlier runs of this sweep; `known` are the build's."""
        self._path = path
        self._transfer = transfer
        self._seen = file_state.SeenFiles(paths.SEEN)
        earlier = records.read(SweepLocks, path).locks if path.exists() else []
        self._known = [*earlier, *known]
        self._made: dict[tuple[object, str | None], Lock] = {}

    @property
    def known(self) -> list[Lock]:
        """The locks that were made before."""
        return self._known

    def sizes(self, source: Source, filename: str | None = None) -> source_sizes.SourceSize:
        """The size of a base, or of the LoRA `filename` of a source; no file of it is fetched."""
        previous = self._previous(source, filename)
        if filename is None:
            return source_sizes.base_size(source, previous, timeout=self._transfer.stall_seconds)
        return source_sizes.lora_size(source, filename, previous, timeout=self._transfer.stall_seconds)

    def base(self, source: Source) -> Lock:
        """Pin a base, see `lora_fuse.hub.lock_base`."""
        return self._pin(source, None, hub.lock_base)

    def lora(self, source: Source, filename: str) -> Lock:
        """Pin a LoRA, see `lora_fuse.hub.lock_lora`."""
        return self._pin(source, filename, partial(hub.lock_lora, filename=filename))

    def _pin(self, source: Source, filename: str | None, lock: Callable[..., Lock]) -> Lock:
        key = (source.place, filename)
        if key not in self._made:
            previous = self._previous(source, filename)
            self._made[key] = lock(source, previous=previous, transfer=self._transfer, note=self._seen.note)
        return self._made[key]

    def keep(self, source: Source, filename: str | None, lock: Lock) -> None:
        """Take a lock that was made elsewhere, of a base or of the LoRA `filename`."""
        self._made[source.place, filename] = replace(lock, requested=source.revision)

    def write(self) -> None:
        """Keep the pins for the next run, and the states of what was hashed."""
        self._seen.write()
        kept = [lock for lock in self._known if all(_kind(lock) != _kind(made) for made in self._made.values())]
        files.replace_text(self._path, records.to_json(SweepLocks(records.SCHEMA, [*kept, *self._made.values()])))

    def _previous(self, source: Source, filename: str | None) -> Lock | None:
        """The lock of the same source, best of the same file; of a base, one that is a pipeline."""
        same = [lock for lock in self._known if (lock.repo_id, lock.path, lock.requested) == source.place]
        if filename is None:
            return next((lock for lock in same if "model_index.json" in lock.files), None)
        return max(same, key=lambda lock: lock.lora_name == filename, default=None)


def _kind(lock: Lock) -> tuple[str | None, str | None, str | None, str]:
    return lock.repo_id, lock.path, lock.requested, lock.lora_name


def check_room(to_fetch: int, to_write: int, folder: Path) -> None:
    """Refuse a sweep that the disk has no room for: what is to be fetched, and a merged checkpoint beside it.

    `to_fetch` bytes come into the Hub client's cache, `to_write` are merged checkpoints in `folder` at a time.

    Raises:
        NoSpace: a disk has less; the message names both numbers.
    """
    needs = {hf_cache.cache_dir(): to_fetch, folder: to_write}
    if len({files.nearest_folder(place).stat().st_dev for place in needs}) == 1:
        needs = {folder: to_fetch + to_write}
    for place, need in needs.items():
        space.require(
            place,
            need,
            "the sweep",
            f"{progress.human_bytes(to_fetch)} of it are fetched and {progress.human_bytes(to_write)} are merged "
            "checkpoints: make room, or sweep without --keep",
        )
