"""The room on a disk: counted and required before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.errors import NoSpace
from lora_fuse.machine.files import nearest_folder
from lora_fuse.machine.progress import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

SPARE = 64 << 20  # bytes to leave free: directories, the manifest, other programs


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """All files of one transfer into a cache: name, size in bytes, and whether it has to be fetched, of each."""

    label: str
    files: tuple[tuple[str, int, bool], ...]
    cache: Path

    @property
    def to_fetch(self) -> int:
        """Bytes that are not in the cache yet."""
        return sum(size for _, size, fetch in self.files if fetch)

    @property
    def free(self) -> int:
        """Bytes that are free on the disk of the cache."""
        return free_bytes(self.cache)

    def __str__(self) -> str:
        total = sum(size for _, size, _ in self.files)
        cached = sum(not fetch for _, _, fetch in self.files)
        here = f"{cached} here already, " if cached else ""
        return (
            f"{len(self.files)} files, {human_bytes(total)} from {self.label}: {here}"
            f"{human_bytes(self.to_fetch)} to fetch, {human_bytes(self.free)} free"
        )

    def check(self) -> None:
        """Refuse what the disk has no room for.

        Raises:
            NoSpace: it has less than is to be fetched.
        """
        require(self.cache, self.to_fetch, self.label, "make room, or set HF_HUB_CACHE to a larger disk")


def free_bytes(path: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(nearest_folder(path)).free


def require(path: Path, nbytes: int, purpose: str, remedy: str) -> None:
    """Refuse what a disk has no room for.

    Args:
        path: a folder on the disk, or one that will be.
        nbytes: bytes that are needed.
        purpose: what they are for, the subject of the message.
        remedy: the way out, the end of the message.

    Raises:
        NoSpace: the disk has less; the message says both numbers, also in bytes, as they may round to the same.
    """
    free = free_bytes(path)
    if nbytes > free:
        raise NoSpace(
            f"{purpose} needs {human_bytes(nbytes)} ({nbytes} bytes), and the disk of {path} has {human_bytes(free)} "
            f"({free} bytes) free; {remedy}"
        )
