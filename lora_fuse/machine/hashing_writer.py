"""A file that is hashed and written at once, window by window, while the next one fills."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Self

import numpy as np

from lora_fuse.machine.direct_io import Writer, block_memory
from lora_fuse.machine.files import FileRecord

WINDOW = 32 << 20  # bytes; whole blocks: a disk takes a large request at several times the speed of small ones
WINDOWS = 3  # one fills, one is hashed and written, one is between


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
