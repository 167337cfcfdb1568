"""Matrices encoded side by side, and handed out in order: as many at once as cores and a bounded memory allow."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable
from lora_fuse.exports.export_contents import WEIGHT, Matrix
from lora_fuse.machine import direct_io

A_CORE = 160 << 20  # bytes: the largest matrix of Qwen-Image in float32
LEAST = 2 * A_CORE
Made = Mapping[str, npt.NDArray[Any]]
Encode = Callable[[str, npt.NDArray[np.float32]], Made]  # a module's name and its matrix


def at_once() -> int:
    """Bytes of float32 that are made or wait to be written at once: some for each core, of what memory there is."""
    return max(LEAST, min((os.cpu_count() or 1) * A_CORE, direct_io.available_memory() // 8))


class MadeInOrder:
    """Codes and scales of each matrix, by module, in the order given; a `with` ends its threads."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], matrix: Matrix, encode: Encode) -> None:
        """Start nothing yet."""
        self._left = deque(shapes.items())
        self._matrix = matrix
        self._encode = encode
        self._running: deque[tuple[str, int, Future[Made]]] = deque()
        self._bytes = 0
        self._at_once = at_once()
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "encode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[str, Made]]:
        """Yield each; what was yielded before counts as written.

        Raises:
            Unquantisable: a matrix cannot be held; the message names it.
        """
        while self._left or self._running:
            self._start()
            module, size, future = self._running.popleft()
            yield module, future.result()
            self._bytes -= size

    def _start(self) -> None:
        while self._left and len(self._running) <= (os.cpu_count() or 1):
            module, (rows, columns) = self._left[0]
            size = 4 * rows * columns
            if self._running and self._bytes + size > self._at_once:
                return
            self._left.popleft()
            self._bytes += size
            self._running.append((module, size, self._threads.submit(self._make, module)))

    def _make(self, module: str) -> Made:
        matrix = self._matrix(module + WEIGHT)
        with naming(module):
            return self._encode(module, matrix)


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Name the layer in what is refused inside."""
    try:
        yield
    except Unquantisable as error:
        raise Unquantisable(
            f"{module + WEIGHT!r} cannot be quantised: {error}; add {module!r} to export.keep to leave it as it is"
        ) from error


def octets(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array in C order, without a copy where that is possible."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
