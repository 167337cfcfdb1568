"""The tensors of safetensors files, each read from where it lies: which files hold weights, some rows of one.

safetensors opens every file first, and so refuses what is none. What is read goes into memory of its own: pages of a
mapped file count as the process's memory, and a few rows of each weight touch most of them.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import direct_io, files
from lora_fuse.verification.byte_comparison import read_into, same_bytes, same_bytes_as_streamed

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Refusal = Callable[[str], Exception]

BLOCK_ROWS = 64  # of a weight at a time, where all of them are looked at: twenty float64 arrays of them fit anywhere
# Those whose numbers are read; all else is bytes.
NUMBERS: Mapping[str, np.dtype[Any]] = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights; of one that is `streamed`, by a name there, `path` has the header and nothing else."""

    path: Path
    streamed: direct_io.StreamedFiles | None = None
    name: str = ""

    def fill(self, wanted: Sequence[tuple[npt.NDArray[np.uint8], int]]) -> bool:
        """Fill memories, each with the bytes from a place on; false where the file has ended.

        Raises:
            OSError: it cannot be read.
            BadSource: the Hub that it is streamed from cannot be had.
        """
        if self.streamed is not None:
            self.streamed.read(self.name, [(memory.data, start) for memory, start in wanted])
            return True
        with files.open_regular(self.path) as file:
            return all(read_into(memory, file, start) == len(memory) for memory, start in wanted)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its dtype by the header's name, its shape, and where its bytes begin; values are read anew.

    `refuse` makes the error of a file that cannot be read any more.
    """

    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    refuse: Refusal

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def read(self, rows: Rows | None = None) -> Array:
        """Values in their own dtype, of all or of some rows: (rows, ...).

        Raises:
            IndexError: it has not so many rows.
            ValueError: numpy has no numbers of this dtype.
            refuse: the file cannot be read, or has ended.
        """
        if self.dtype not in NUMBERS:
            raise ValueError(f"numbers of the dtype {self.dtype} are not read")
        if rows is None:
            memory = np.empty(self.nbytes, np.uint8)
            self._fill([(memory, self.start)])
            return memory.view(NUMBERS[self.dtype]).reshape(self.shape)
        if rows.max(initial=0) >= len(self):
            raise IndexError(f"it has {len(self)} rows, and row {rows.max()} is asked for")
        width = self.nbytes // len(self)
        memory = np.empty((len(rows), width), np.uint8)
        breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        runs = pairwise(breaks)
        self._fill([(memory[a:b].reshape(-1), self.start + int(rows[a]) * width) for a, b in runs if a < b])
        return memory.reshape(-1).view(NUMBERS[self.dtype]).reshape(len(rows), *self.shape[1:])

    def _fill(self, wanted: Sequence[tuple[npt.NDArray[np.uint8], int]]) -> None:
        try:
            if self.file.fill(wanted):
                return
        except OSError as error:
            raise self.refuse(f"{self.file.path} cannot be read ({error.strerror}); fetch or make it again") from error
        raise self.refuse(f"{self.file.path} ends before its last tensor does; run again when nothing writes to it")

    @property
    def nbytes_merged(self) -> int:
        """Size in bytes of what a merge has in its place."""
        return self.nbytes

    def is_like(self, other: StoredTensor) -> bool:
        """True where another tensor has the same dtype and shape."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)

    def same(self, other: StoredTensor, piece: tuple[int, int]) -> bool:
        """True where a piece, start and size in bytes, is the same as of another tensor that is as large."""
        start, nbytes = piece
        starts = (self.start + start, other.start + start)
        try:
            if other.file.streamed is not None:
                return same_bytes_as_streamed(self.file.path, other.file.fill, starts, nbytes)
            return same_bytes(self.file.path, other.file.path, starts, nbytes)
        except OSError as error:
            raise self.refuse(f"{error.filename} cannot be read ({error.strerror}); fetch or make it again") from error


class Weights:
    """The tensors of safetensors files in one place, by name. Bytes are bytes: numpy has no name for some dtypes."""

    def __init__(self, paths: Sequence[Path | WeightFile], refuse: Refusal = BadCheckpoint) -> None:
        """Read the headers.

        Raises:
            refuse: a file cannot be opened.
        """
        self._tensors: dict[str, StoredTensor] = {}
        self.is_gguf = False  # all of one file, then
        self.metadata: dict[str, dict[str, str]] = {}  # of each file's header, by the file's name
        for given in paths:
            file = given if isinstance(given, WeightFile) else WeightFile(given)
            path = file.path
            entries, data = _read_header(path, refuse)
            self.metadata[path.name] = entries.pop("__metadata__", None) or {}  # null is none, for safetensors too
            for name, entry in entries.items():
                start, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                self._tensors[name] = StoredTensor(file, entry["dtype"], shape, data + start, end - start, refuse)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def add(self, name: str, tensor: StoredTensor) -> None:
        """Add a tensor that was found otherwise."""
        self._tensors[name] = tensor

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._tensors)


def _read_header(path: Path, refuse: Refusal) -> tuple[dict[str, Any], int]:
    """A header's entries, and where the data begins; safetensors looks at all of it first.

    Raises:
        refuse: the file cannot be opened.
    """
    try:
        files.refuse_special(path, path.stat())  # a named pipe would wait
        with safe_open(path, framework="np"), files.open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length
    except (OSError, SafetensorError) as reason:
        raise refuse(f"{path} cannot be opened as safetensors ({reason}); fetch or make it again") from reason


def weight_files(root: Path, component: str) -> list[Path]:
    """The safetensors files of a file, a component folder or a pipeline's component; those that a fuse would change.

    Raises:
        BadCheckpoint: there are none, or see `repository_files.sort_files`.
    """
    if root.is_file():
        return [root]
    folder = component if (root / repository_files.MODEL_INDEX).is_file() else ""
    return [root / name for name in repository_files.sort_folder(root, folder).shards]


def row_blocks(name: str, total: int, rows: int | None) -> Iterator[Rows]:
    """Rows to measure, the same in every run: all in blocks, or the first, the last and some that the name draws."""
    if rows is None or rows >= total:
        yield from np.array_split(np.arange(total), max(1, math.ceil(total / BLOCK_ROWS)))
        return
    drawn = np.random.default_rng(zlib.crc32(name.encode())).choice(total, size=rows, replace=False)
    yield np.unique(np.concatenate([drawn[: max(rows - 2, 0)], [0, total - 1]]))


def drawn_rows(seed: int, name: str, total: int, rows: int, but: Rows) -> Rows:
    """So many more rows, which nobody knows who does not know the seed."""
    others = np.setdiff1d(np.arange(total), but)
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(draw.choice(others, size=min(rows, len(others)), replace=False))
