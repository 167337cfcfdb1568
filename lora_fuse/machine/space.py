"""What a transfer will take, said and checked before it begins. Pure but for asking how much of a disk is free."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.errors import NoSpace
from lora_fuse.machine.progress import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SPARE = 64 << 20  # bytes to leave free: directories, the manifest, other programs


@dataclass(frozen=True, slots=True)
class Planned:
    """One file: its size in bytes, and whether it has to be fetched (or lies in the cache already)."""

    name: str
    size: int
    fetch: bool


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """All files of one transfer into a cache."""

    label: str
    files: tuple[Planned, ...]
    cache: Path

    @property
    def to_fetch(self) -> int:
        """Bytes that are not here yet."""
        return sum(file.size for file in self.files if file.fetch)

    @property
    def free(self) -> int:
        """Bytes that are free on the disk of the cache."""
        return free_bytes(self.cache)

    def __str__(self) -> str:
        total, cached = sum(file.size for file in self.files), sum(not file.fetch for file in self.files)
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
        if self.to_fetch > self.free:
            raise NoSpace(
                f"{self.label} needs {human_bytes(self.to_fetch)} ({self.to_fetch} bytes), and the disk of "
                f"{self.cache} has {human_bytes(self.free)} ({self.free} bytes) free; make room, or set HF_HUB_CACHE "
                "to a larger disk"
            )


def free_bytes(path: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there: Iterable[Path] = (path, *path.parents)
    return next(shutil.disk_usage(folder).free for folder in there if folder.exists())
