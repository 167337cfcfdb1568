"""Large files read and written past the page cache, where the system can, and hashed while they are written.

A checkpoint that is larger than what a cache is good for pays for the cache's pages and waits for the disk as well.
What is in the cache already is read from there. O_DIRECT wants memory, offsets and lengths in whole blocks (open(2),
NOTES), so memory comes from here.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine.files import FileRecord

SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
BLOCK = 4096  # bytes; a multiple of every disk's own
AT_ONCE = 8 << 20  # bytes that are read past the cache at once
WINDOW = 16 << 20  # bytes; whole blocks: a disk takes a large request at several times the speed of small ones
WINDOWS = 4  # one is read, one is changed, one is hashed and one is written


def blocks(nbytes: int) -> int:
    """A number of bytes rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def block_memory(nbytes: int) -> memoryview:
    """Memory for `nbytes` and a block more, which begins at a block, as `Writer.write` needs it."""
    memory = mmap.mmap(-1, blocks(nbytes) + BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a disk is given memory in pieces that are contiguous: let them be large
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def too_large_to_cache(nbytes: int) -> bool:
    """True where so many bytes to write would make the kernel write at once (`dirty_background_ratio` in its docs)."""
    try:
        share = int(Path("/proc/sys/vm/dirty_background_ratio").read_text()) / 100
        return nbytes > share * _available_memory()
    except (OSError, ValueError):  # not Linux
        return False


def available_memory(unknown: int = 1 << 30) -> int:
    """Bytes of memory that programs can be given without swapping, or what is said where the system does not tell."""
    try:
        return _available_memory()
    except (OSError, ValueError):  # not Linux
        return unknown


def _available_memory() -> int:
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


class Stopped(Exception):
    """Another shard failed, or the run was interrupted."""


class ByteSource(Protocol):
    """Bytes of a file of the base, wherever they come from."""

    def fill(self, memory: memoryview, start: int) -> None:
        """Fill memory with the bytes from `start` on; of what arrives from elsewhere, each once and in order."""


class StreamedFiles(Protocol):
    """Files that arrive while they are read and never lie on a disk: where they should lie is a hole.

    `records` has those files only, each with what was promised of it, by POSIX path.
    """

    label: str
    records: Mapping[str, FileRecord]

    def open(self, name: str, read: bytes = b"") -> AbstractContextManager[ByteSource]:
        """Read a file in order, behind the bytes that were `read` before; all of it, or its end is an error.

        Raises:
            WrongContent: at the end, what arrived is not what was promised.
            BadSource: it cannot be had.
        """

    def read(self, name: str, wanted: Sequence[tuple[memoryview, int]]) -> None:
        """Fill memories, each with the bytes from a place on; who reads so checks no sha256.

        Raises:
            BadSource: they cannot be had.
        """

    def stop(self) -> None:
        """End what is being read, whose readers raise `Stopped`."""

    def twice(self, name: str, work: Callable[[], FileRecord]) -> FileRecord:
        """Do work on a file, and once more where that was refused for its bytes."""


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
    """A file to read from, in one thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, os.O_RDONLY | os.O_NONBLOCK, direct=True)  # a named pipe would wait
        self._blocks = memoryview(b"")

    def read(self, memory: memoryview, start: int) -> int:
        """Fill memory with the bytes from `start` on; returns how many there are, fewer only where the file ends."""
        done = 0
        while done < len(memory) and (got := self._read_some(memory[done:], start + done)):
            done += got
        return done

    def fill(self, memory: memoryview, start: int) -> None:
        """Fill memory with a part of a shard.

        Raises:
            BadCheckpoint: it cannot be read, or is not there any more.
        """
        with _reading(self.path):
            missing = len(memory) - self.read(memory, start)
        if missing:
            raise BadCheckpoint(f"{self.path} ended {missing} bytes early: it changed while it was read")

    def _read_some(self, memory: memoryview, start: int) -> int:
        if self._direct is None:
            return os.preadv(self._plain, [memory], start)
        with suppress(OSError, AttributeError):  # EAGAIN: not in the cache
            if cached := os.preadv(self._plain, [memory], start, os.RWF_NOWAIT):
                return cached
        if not self._blocks:
            self._blocks = block_memory(AT_ONCE)
        lead = start % BLOCK
        wanted = min(len(memory), AT_ONCE)
        got = os.preadv(self._direct, [self._blocks[: blocks(lead + wanted)]], start - lead)
        part = self._blocks[lead : min(got, lead + wanted)]
        copy(part, memory)
        return len(part)


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


def copy(data: memoryview | bytes, memory: memoryview) -> None:
    """Copy to the beginning of some memory, while other threads go on, as they do not in an assignment of Python's."""
    np.copyto(np.frombuffer(memory, np.uint8, count=len(data)), np.frombuffer(data, np.uint8))


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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read ({error.strerror}); check the disk or fetch it again") from error


@dataclass(slots=True)
class _Window:
    memory: memoryview = field(default_factory=lambda: block_memory(WINDOW))
    sealed: Future[Future[None]] | None = None  # to be hashed; then the future of its writing

    def wait(self) -> None:
        if self.sealed is not None:
            self.sealed.result().result()
            self.sealed = None


class HashingWriter:
    """Takes bytes in order, from one thread; `finish` gives size and sha256.

    Bytes are made, hashed and written in one place, a window. The disk takes whole blocks, so a window begins with what
    the last one left of a block: less than one, and all that is copied.
    """

    def __init__(self, path: Path, progress: Callable[[int], None], direct: bool, windows: int = WINDOWS) -> None:
        """Open `path` anew; `progress` is told how many more bytes are written, `direct` writes past the cache."""
        self._writer = Writer(path, direct)
        self._progress = progress
        self._digest = hashlib.sha256()
        self._size = 0
        self._windows = [_Window() for _ in range(windows)]
        self._next = cycle(self._windows)
        self._window = next(self._next)
        self._lead = 0  # bytes at the beginning of the window that are the last one's
        self._filled = 0  # bytes behind them
        self._rest = b""  # the last window's bytes that are not written yet; of the thread that hashes
        self._hashing = ThreadPoolExecutor(1, "hash")
        self._writing = ThreadPoolExecutor(1, "write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._hashing, self._writing):
            pool.shutdown(cancel_futures=True)
        self._writer.__exit__(*error)

    @property
    def memories(self) -> list[memoryview]:
        """All the memory that `room` may be a part of."""
        return [window.memory for window in self._windows]

    def room(self) -> memoryview:
        """Memory for the next bytes: `WINDOW` less what was appended since the last `send`. Waits until it is free.

        Raises:
            OSError: an earlier window could not be written.
            Exception: what it waited for failed.
        """
        self._window.wait()
        return self._window.memory[self._lead + self._filled : self._lead + WINDOW]

    def send(self, nbytes: int, ready: Sequence[Future[None]] = ()) -> None:
        """Take the first `nbytes` of `room` as they are when all of `ready` are done."""
        end = self._lead + self._filled + nbytes
        self._window.sealed = self._hashing.submit(self._seal, self._window.memory, self._lead, end, ready)
        self._size += end - self._lead
        self._lead = end % BLOCK
        self._filled = 0
        self._window = next(self._next)

    def append(self, data: memoryview | bytes) -> None:
        """Take some bytes; they are copied.

        Raises:
            OSError: see `room`.
        """
        left = memoryview(data)
        while left:
            room = self.room()
            part = left[: len(room)]
            copy(part, room)
            left = left[len(part) :]
            self._filled += len(part)
            if len(part) == len(room):
                self.send(0)

    def _seal(self, memory: memoryview, lead: int, end: int, ready: Sequence[Future[None]]) -> Future[None]:
        for future in ready:
            future.result()
        memory[:lead] = self._rest
        whole = end // BLOCK * BLOCK
        self._rest = bytes(memory[whole:end])
        written = self._writing.submit(self._write, memory, whole)
        self._digest.update(memory[lead:end])
        return written

    def _write(self, memory: memoryview, nbytes: int) -> None:
        self._writer.write(memory, nbytes)
        self._progress(nbytes)

    def finish(self) -> FileRecord:
        """Write what is left; the file is whole then.

        Raises:
            OSError: it could not be written.
            Exception: see `room`.
        """
        self.send(0)
        for window in self._windows:
            window.wait()
        self._write(memoryview(self._rest), len(self._rest))
        return FileRecord(self._size, self._digest.hexdigest())
