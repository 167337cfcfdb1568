"""Matrices encoded side by side, and handed out in order: as many at once as cores and a bounded memory allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import Unquantisable
from lora_fuse.exports.export_contents import WEIGHT, Matrix
from lora_fuse.machine import direct_io, file_state

A_CORE = 160 << 20  # bytes: the largest matrix of Qwen-Image in float32
LEAST = 2 * A_CORE
Made = Mapping[str, npt.NDArray[Any]]
Encode = Callable[[str, npt.NDArray[np.float32]], Made]  # a module's name and its matrix


def at_once() -> int:
    """Bytes of float32 that are made or wait to be written at once: some for each core, of what memory there is."""
    return max(LEAST, min((os.cpu_count() or 1) * A_CORE, direct_io.available_memory() // 8))


@contextmanager
def made_in_order(
    shapes: Mapping[str, tuple[int, int]], matrix: Matrix, encode: Encode
) -> Iterator[Iterator[tuple[str, Made]]]:
    """Within it, the codes and scales of each matrix, by module, in the order given; what was taken counts as written.

    Taking one raises:
        Unquantisable: a matrix cannot be held; the message names it.
    """

    def make(module: str) -> tuple[str, Made]:
        values = matrix(module + WEIGHT)
        with naming(module):
            return module, encode(module, values)

    work = ((4 * rows * columns, partial(make, module)) for module, (rows, columns) in shapes.items())
    threads = ThreadPoolExecutor(os.cpu_count() or 1, "encode")
    try:
        yield file_state.in_order(threads, work, at_once())
    finally:
        threads.shutdown(cancel_futures=True)


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
