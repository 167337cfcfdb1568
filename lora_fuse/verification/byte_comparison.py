"""Bytes of two files, compared as they lie there: piece by piece, in two small buffers, by many threads at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_fuse.machine import files

Bytes = npt.NDArray[np.uint8]

PIECE = 64 << 20  # bytes that one thread compares, so that none has a whole file to itself at the end
STREAMED = 8 << 20  # bytes that are fetched at a time
BLOCK = 1 << 20  # bytes that are read at a time, two of which stay in a core's cache until they are compared


def pieces(nbytes: int) -> list[tuple[int, int]]:
    """Start and size of the pieces of so many bytes; of none, one that is empty."""
    return [(start, min(PIECE, nbytes - start)) for start in range(0, max(nbytes, 1), PIECE)]


def same_bytes(ours: Path, theirs: Path, starts: tuple[int, int], nbytes: int) -> bool:
    """True where so many bytes are the same from either start on; not read where both are one file's own.

    Raises:
        OSError: a file cannot be read, or is no regular one.
    """
    with files.open_regular(ours) as one, files.open_regular(theirs) as other:
        if starts[0] == starts[1] and os.path.sameopenfile(one.fileno(), other.fileno()):
            return True
        block = max(8, min(BLOCK, -(-nbytes // 8) * 8))
        memory = np.zeros((2, block), np.uint8)
        for at in range(0, nbytes, block):
            count = min(block, nbytes - at)
            memory[:, count:] = 0  # whole words are compared
            sides = zip(memory[:, :count], (one, other), starts, strict=True)
            read = [read_into(side, file, start + at) for side, file, start in sides]
            words = memory.view(np.uint64)
            if read != [count, count] or not np.array_equal(words[0], words[1]):
                return False
    return True


def same_bytes_as_streamed(
    ours: Path, fill: Callable[[Sequence[tuple[Bytes, int]]], bool], starts: tuple[int, int], nbytes: int
) -> bool:
    """As `same_bytes`, with a file whose bytes `fill` fetches.

    Raises:
        OSError, Refused: a side cannot be read.
    """
    with files.open_regular(ours) as file:
        for at in range(0, nbytes, STREAMED):
            sides = np.zeros((2, min(STREAMED, nbytes - at)), np.uint8)
            read = read_into(sides[0], file, starts[0] + at)
            if not fill([(sides[1], starts[1] + at)]) or read != len(sides[0]) or not np.array_equal(*sides):
                return False
    return True


def read_into(memory: Bytes, file: BufferedReader, start: int) -> int:
    """Fill memory with a file's bytes from `start` on.

    Returns:
        The number of bytes: fewer than fit where the file ends.
    """
    done = 0
    while done < len(memory) and (got := os.preadv(file.fileno(), [memory[done:].data], start + done)):
        done += got
    return done
