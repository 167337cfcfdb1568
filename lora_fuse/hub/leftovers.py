"""What killed transfers leave in the Hub client's cache: `ETAG.RANDOM.incomplete`, which nothing takes up again."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_fuse.recipe import hf_cache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def incomplete(repo_id: str) -> list[Path]:
    """The files of transfers that are under way, or that were killed."""
    return sorted((hf_cache.repository_folder(repo_id) / "blobs").glob("*.incomplete"))


def remove_leftovers(repo_id: str, before: float) -> int:
    """Remove what killed transfers left of a repository's files; what a live process works on stays.

    The client holds a lock on a file (by its ETag) while it is fetched, so an incomplete file whose lock is free
    belongs to nobody.

    Args:
        repo_id: the repository.
        before: files written to at this time (seconds of the epoch) or later stay, whatever their lock.

    Returns:
        The bytes that were freed.
    """
    freed = 0
    for path in incomplete(repo_id):
        with _lock(hf_cache.locks_folder(repo_id) / f"{path.name.partition('.')[0]}.lock") as mine:
            try:
                found = path.stat()
                if mine and found.st_mtime < before:
                    path.unlink()
                    freed += found.st_size
            except FileNotFoundError:
                continue  # whoever it belonged to has finished it
    return freed


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether nobody holds the client's lock, which is then held here meanwhile."""
    try:
        file = path.open("r+b")
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
