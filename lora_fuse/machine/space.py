"""The room on a disk: counted and required before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_fuse.errors import NoSpace
from lora_fuse.machine.files import nearest_folder
from lora_fuse.machine.progress import human_bytes

SPARE = 64 << 20  # bytes to leave free: directories, the manifest, other programs


def free_bytes(path: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(nearest_folder(path)).free


def require(path: Path, nbytes: int, purpose: str, remedy: str) -> None:
    """Refuse what a disk has no room for; `path` is a folder on it, or will be, `purpose` the subject of the message.

    Raises:
        NoSpace: the disk has less; the message says both numbers, also in bytes, as they may round to the same.
    """
    free = free_bytes(path)
    if nbytes > free:
        raise NoSpace(
            f"{purpose} needs {human_bytes(nbytes)} ({nbytes} bytes), and the disk of {path} has {human_bytes(free)} "
            f"({free} bytes) free; {remedy}"
        )
