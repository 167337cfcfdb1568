"""Parts of the base's shards, and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path

from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine.direct_io import Reader


def open_shard(path: Path) -> Reader:
    """Open a shard of the base.

    Raises:
        BadCheckpoint: it cannot be opened.
    """
    try:
        return Reader(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_exactly(source: Reader, memory: memoryview, start: int, nbytes: int) -> memoryview:
    """Read a part of a shard into memory.

    Raises:
        BadCheckpoint: it cannot be read, or is not there any more.
    """
    try:
        data = source.read(memory, start, nbytes)
    except OSError as error:
        raise _unreadable(source.path, error) from error
    if len(data) < nbytes:
        raise BadCheckpoint(f"{source.path} ended {nbytes - len(data)} bytes early: it changed while it was read")
    return data


def _unreadable(path: Path, error: OSError) -> BadCheckpoint:
    return BadCheckpoint(f"{path} cannot be read ({error.strerror}); check the disk or fetch it again")
