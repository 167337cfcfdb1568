"""A file of the Hub as a stream: ranges are fetched ahead, taken in order, and hashed while they pass.

Memory: a reader has `LEAST` ranges at a time, and as many more as its `Lane` has to spare for all of them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Semaphore
from typing import TYPE_CHECKING, Self

from lora_fuse.errors import BadCheckpoint, WrongContent
from lora_fuse.hub.streaming.remote_file import FETCH, RemoteFile
from lora_fuse.machine import direct_io

if TYPE_CHECKING:
    from types import TracebackType

RANGE = 8 << 20  # bytes
LEAST = 2  # ranges of each reader: one is taken while the next one comes
READERS = 16  # at a time
MORE = 24  # ranges beyond the least ones, of all readers together: at most 448 MiB with those


@dataclass(frozen=True, slots=True)
class Lanes:
    """The threads that fetch ranges for all readers, and the memory that these may have."""

    threads: ThreadPoolExecutor
    workers: int
    readers: Semaphore = field(default_factory=lambda: Semaphore(READERS))
    more: Semaphore = field(default_factory=lambda: Semaphore(MORE))


@dataclass(slots=True)
class _Range:
    """Bytes that come, in memory of their own; `is_more` of those beyond the least ones."""

    data: memoryview
    came: Future[None]
    is_more: bool
    hashed: Future[None] | None = None


class ArrivingFile:
    """Takes a file in order, from behind the bytes that were `read` before to its end; within a `with`."""

    def __init__(self, remote: RemoteFile, lanes: Lanes, read: bytes = b"") -> None:
        """Ask for nothing yet."""
        self._remote = remote
        self._lanes = lanes
        self._size = remote.record.size
        self._digest = hashlib.sha256(read)
        self._asked = self._at = len(read)
        self._left = memoryview(b"")  # of the range that is taken now
        self._ranges: deque[_Range] = deque()  # the first is the one that is taken
        self._spare: list[memoryview] = []
        self._hashing = ThreadPoolExecutor(1, "arriving")

    def __enter__(self) -> Self:
        self._lanes.readers.acquire()
        self._ask()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._check()
        finally:
            self._remote.close()
            self._hashing.shutdown(cancel_futures=True)
            for one in self._ranges:
                one.came.cancel()
            wait([one.came for one in self._ranges])
            while self._ranges:
                self._give_back(self._ranges.popleft())
            self._lanes.readers.release()

    def fill(self, memory: memoryview, start: int) -> None:
        """Take the next bytes, which are those from `start` on.

        Raises:
            BadCheckpoint: they are not: what is streamed is read once, and in order.
            WrongContent, ConnectionLost, BadSource: see `RemoteFile.read`.
        """
        if start != self._at or start + len(memory) > self._size:
            raise BadCheckpoint(
                f"{self._remote.label} is streamed: after byte {self._at} of {self._size} came, those from {start} to "
                f"{start + len(memory)} were asked for; {FETCH}"
            )
        done = 0
        while done < len(memory):
            if not self._left:
                self._next()
            count = min(len(self._left), len(memory) - done)
            direct_io.copy(self._left[:count], memory[done : done + count])
            self._left = self._left[count:]
            done += count
        self._at += done

    def _next(self) -> None:
        """Go on to the next range."""
        if self._ranges and self._ranges[0].hashed is not None:
            self._give_back(self._ranges.popleft())
        self._ask()
        one = self._ranges[0]
        one.came.result()
        one.hashed = self._hashing.submit(self._digest.update, one.data)
        self._left = one.data

    def _ask(self) -> None:
        """Ask for further ranges, as many as may be under way."""
        while self._asked < self._size and len(self._ranges) < max(LEAST, self._lanes.workers):
            is_more = len(self._ranges) >= LEAST
            if is_more and not self._lanes.more.acquire(blocking=False):
                return
            whole = self._spare.pop() if self._spare else memoryview(bytearray(min(RANGE, self._size - self._asked)))
            data = whole[: self._size - self._asked]
            came = self._lanes.threads.submit(self._remote.read, data, self._asked)
            self._ranges.append(_Range(data, came, is_more))
            self._asked += len(data)

    def _give_back(self, one: _Range) -> None:
        if one.hashed is not None and not one.hashed.cancelled():
            one.hashed.result()
        if len(one.data) == RANGE:
            self._spare.append(one.data)
        if one.is_more:
            self._lanes.more.release()

    def _check(self) -> None:
        """Refuse what arrived if it is not what was promised.

        Raises:
            BadCheckpoint: it was not read to its end.
            WrongContent: its sha256 is another one.
        """
        if self._at != self._size:
            raise BadCheckpoint(f"{self._remote.label}: {self._at} of {self._size} bytes were read; {FETCH}")
        while self._ranges:
            self._give_back(self._ranges.popleft())
        sha256 = self._digest.hexdigest()
        if sha256 != self._remote.record.sha256:
            raise WrongContent(f"{self._remote.label}: sha256 {sha256}, expected {self._remote.record.sha256}")
