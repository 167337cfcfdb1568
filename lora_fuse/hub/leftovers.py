"""Leftovers of killed transfers in the Hub client's cache: `ETAG.RANDOM.incomplete`, which nothing takes up again."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_fuse.machine import files
from lora_fuse.recipe import hf_cache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def remove_leftovers(repo_id: str, before: float) -> int:
    """Remove incomplete files of a repository that no live process works on; returns the bytes that were freed.

    The client holds a lock on a file (by its ETag) while it is fetched, so an incomplete file whose lock is free
    belongs to nobody. Files written to at `before` (seconds of the epoch) or later stay, whatever their lock.
    """
    freed = 0
    for path in sorted((hf_cache.repository_folder(repo_id) / "blobs").glob("*.incomplete")):
        with _lock(hf_cache.locks_folder(repo_id) / f"{path.name.partition('.')[0]}.lock") as is_free:
            try:
                info = path.stat()
                if is_free and info.st_mtime < before:
                    path.unlink()
                    freed += info.st_size
            except FileNotFoundError:
                continue  # its process has finished it
    return freed


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the client's lock if nobody else does; yields whether that is so."""
    try:
        file = files.open_lock(path, create=False)
    except FileNotFoundError:
        yield True
        return
    except OSError:  # another user's
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
