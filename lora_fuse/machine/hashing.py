"""Files hashed by as many threads as there are cores, and other work that threads do while its results are taken.

SHA-256 of one file is serial, so the largest file bounds them all: it is the first.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event
from typing import Any, BinaryIO, Self, TypeVar

BLOCK = 1 << 20  # bytes hashed at once; Python lets other threads run meanwhile
Advance = Callable[[int], None]  # told how many more bytes were read, from any thread
Item = TypeVar("Item")
Result = TypeVar("Result")


def feed(file: BinaryIO, digests: Sequence[Any], advance: Advance) -> None:
    """Read a file once, and feed all of it to some hashes."""
    while block := file.read(BLOCK):
        for digest in digests:
            digest.update(block)
        advance(len(block))


class HashingThreads:
    """Threads that hash, one a core, until the end of a `with`: by an error or Ctrl-C they end at once.

    The work is to call what it is given as `advance` now and then: after the end that call ends what is under way.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._stop = Event()
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "hash")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads.shutdown(cancel_futures=True)

    def submit(self, work: Callable[[Item, Advance], Result], item: Item) -> Future[Result]:
        """Do some work on an item as soon as a core is free."""
        return self._threads.submit(work, item, self._told)

    def _told(self, count: int) -> None:
        if self._stop.is_set():
            raise CancelledError
        self._advance(count)


def in_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance, size: Callable[[Item], int]
) -> list[Result]:
    """Do some work that reads on all items, see `HashingThreads`, those of the largest `size` in bytes first.

    Returns the results in the order of the items, and raises the first error in that order.
    """
    with HashingThreads(advance) as threads:
        largest_first = sorted(range(len(items)), key=lambda at: size(items[at]), reverse=True)
        running = {at: threads.submit(work, items[at]) for at in largest_first}
        return [running[at].result() for at in range(len(items))]


def in_order(
    threads: ThreadPoolExecutor, work: Iterable[tuple[int, Callable[[], Result]]], most: int
) -> Iterator[Result]:
    """Do work in threads, and yield the results in the order in which it is given.

    Each comes with what it weighs, as bytes, or 1: no more than `most` is under way or waits to be taken, the result
    that was yielded last with it, but for one that weighs more alone; so little is taken from whoever makes the work.
    Where nobody asks any more, what was not begun is not.
    """
    running: deque[tuple[int, Future[Result]]] = deque()
    total = 0
    try:
        for weight, one in work:
            while running and total + weight > most:
                lighter, future = running.popleft()
                yield future.result()
                total -= lighter
            running.append((weight, threads.submit(one)))
            total += weight
        while running:
            yield running.popleft()[1].result()
    finally:
        for _, future in running:
            future.cancel()
