"""The room on a disk: counted and required before anything is written."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from lora_fuse.errors import NoSpace
from lora_fuse.machine.files import nearest_folder
from lora_fuse.machine.progress import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

SPARE = 64 << 20  # bytes to leave free: directories, the manifest, other programs


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
