"""Large files read and written past the page cache, where the system can, and hashed while they are written.

A checkpoint that is larger than what a cache is good for pays for the cache's pages and waits for the disk as well.
What is in the cache already is read from there. O_DIRECT wants memory, offsets and lengths in whole blocks (open(2),
NOTES), so memory comes from here and holds a block more than is asked for at either end.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Self

import numpy as np

from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine.files import FileRecord

SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
BLOCK = 4096  # bytes; a multiple of every disk's own
WINDOW = 32 << 20  # bytes; whole blocks: a disk takes a large request at several times the speed of small ones
WINDOWS = 3  # one fills, one is hashed and written, one is between


def blocks(nbytes: int) -> int:
    """A number of bytes rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def block_memory(nbytes: int) -> memoryview:
    """Memory for `Reader.read` of up to `nbytes`, or for `Writer.write`."""
    memory = mmap.mmap(-1, blocks(nbytes) + 2 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a disk is given memory in pieces that are contiguous: let them be large
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def too_large_to_cache(nbytes: int) -> bool:
    """True where so many bytes to write would make the kernel write at once (`dirty_background_ratio` in its docs)."""
    try:
        share = int(Path("/proc/sys/vm/dirty_background_ratio").read_text()) / 100
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        return nbytes > share * int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux
        return False


class _File:
    def __init__(self, path: Path, flags: int, direct: bool) -> None:
        self.path = path
        self._plain = os.open(path, flags, 0o666)
        self._direct: int | None = None
        if direct:
            with suppress(OSError, AttributeError):  # a filesystem, or a system, that cannot
                self._direct = os.open(path, flags & ~os.O_TRUNC | os.O_DIRECT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)


class Reader(_File):
    """A file to read from."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, os.O_RDONLY | os.O_NONBLOCK, direct=True)  # a named pipe would wait

    def read(self, memory: memoryview, start: int, nbytes: int) -> memoryview:
        """Bytes from `start` on, as a part of `memory`; fewer than `nbytes` where the file ends."""
        lead = start % BLOCK
        wanted = memory[lead : lead + nbytes]
        if self._direct is None:
            return wanted[: _read(self._plain, wanted, start)]
        with suppress(OSError, AttributeError):  # EAGAIN: not in the cache
            if os.preadv(self._plain, [wanted], start, os.RWF_NOWAIT) == nbytes:
                return wanted
        got = os.preadv(self._direct, [memory[: blocks(lead + nbytes)]], start - lead)
        if lead + nbytes > got > 0:  # near the end, or interrupted: the rest need not begin at a block
            got += _read(self._plain, memory[got : lead + nbytes], start - lead + got)
        return wanted[: max(0, got - lead)]


class Writer(_File):
    """A new file, written from its beginning to its end."""

    def __init__(self, path: Path, direct: bool) -> None:
        super().__init__(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, direct)
        self._size = 0

    def write(self, memory: memoryview, nbytes: int) -> None:
        """Append the first `nbytes` of `memory`: whole blocks but for the last time, or the cache is used."""
        done = 0
        whole = nbytes // BLOCK * BLOCK
        if self._direct is not None and self._size % BLOCK == 0:
            with suppress(OSError):  # what a direct write cannot do, a plain one does, or says why not
                done = os.pwrite(self._direct, memory[:whole], self._size)
        _write(self._plain, memory[done:nbytes], self._size + done)
        _write_back(self._plain, self._size + done, nbytes - done)
        self._size += nbytes


def _read(fd: int, memory: memoryview, start: int) -> int:
    done = 0
    while done < len(memory) and (got := os.preadv(fd, [memory[done:]], start + done)):
        done += got
    return done


def _write(fd: int, memory: memoryview, start: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(fd, memory[done:], start + done)


def _write_back(fd: int, start: int, nbytes: int) -> None:
    """Let the disk begin with a part of the cache now, so that little is left to wait for at the end (Linux)."""
    if nbytes:
        with suppress(OSError, AttributeError):
            offsets = (ctypes.c_int64(start), ctypes.c_int64(nbytes))
            ctypes.CDLL(None).sync_file_range(fd, *offsets, SYNC_FILE_RANGE_WRITE)


def open_shard(path: Path) -> Reader:
    """Open a shard of the base.

    Raises:
        BadCheckpoint: it cannot be opened.
    """
    with _reading(path):
        return Reader(path)


def read_exactly(source: Reader, memory: memoryview, start: int, nbytes: int) -> memoryview:
    """Read a part of a shard into memory.

    Raises:
        BadCheckpoint: it cannot be read, or is not there any more.
    """
    with _reading(source.path):
        data = source.read(memory, start, nbytes)
    if len(data) < nbytes:
        raise BadCheckpoint(f"{source.path} ended {nbytes - len(data)} bytes early: it changed while it was read")
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read ({error.strerror}); check the disk or fetch it again") from error


@dataclass(slots=True)
class _Window:
    memory: memoryview = field(default_factory=lambda: block_memory(WINDOW))
    filled: int = 0
    busy: tuple[Future[None], ...] = ()

    def wait(self) -> None:
        for future in self.busy:
            future.result()
        self.filled = 0
        self.busy = ()


class HashingWriter:
    """Takes bytes in order, from one thread; `finish` gives size and sha256."""

    def __init__(self, path: Path, progress: Callable[[int], None], direct: bool) -> None:
        """Open `path` anew; `progress` is told how many more bytes are written, `direct` writes past the cache."""
        self._writer = Writer(path, direct)
        self._progress = progress
        self._digest = hashlib.sha256()
        self._size = 0
        self._windows = cycle([_Window() for _ in range(WINDOWS)])
        self._window = next(self._windows)
        self._hashing = ThreadPoolExecutor(1, "hash")
        self._writing = ThreadPoolExecutor(1, "write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._hashing, self._writing):
            pool.shutdown(cancel_futures=True)
        self._writer.__exit__(*error)

    def append(self, data: memoryview | bytes) -> None:
        """Take some bytes; they are copied.

        Raises:
            OSError: an earlier window could not be written.
        """
        left = np.frombuffer(data, dtype=np.uint8)
        while len(left):
            window = self._window
            part, left = np.split(left, [WINDOW - window.filled])
            np.copyto(np.frombuffer(window.memory, dtype=np.uint8, count=len(part), offset=window.filled), part)
            window.filled += len(part)
            if window.filled == WINDOW:
                self._send()

    def _send(self) -> None:
        window = self._window
        nbytes = window.filled
        self._size += nbytes
        hashing = self._hashing.submit(self._digest.update, window.memory[:nbytes])
        window.busy = (hashing, self._writing.submit(self._write, window.memory, nbytes))
        self._window = next(self._windows)
        self._window.wait()

    def _write(self, memory: memoryview, nbytes: int) -> None:
        self._writer.write(memory, nbytes)
        self._progress(nbytes)

    def finish(self) -> FileRecord:
        """Write what is left; the file is whole then.

        Raises:
            OSError: it could not be written.
        """
        self._send()
        for _ in range(WINDOWS):
            self._window.wait()
            self._window = next(self._windows)
        return FileRecord(self._size, self._digest.hexdigest())
