"""The weights of a checkpoint, opened through safetensors: which files hold them, their tensors, some rows of one."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import files

Array = npt.NDArray[Any]

BLOCK = 4 << 20  # bytes of a tensor that are compared at a time, so that they stay in a cache


def opened(file: Path, error: Callable[[str], Exception]) -> AbstractContextManager[Any]:
    """A safetensors file.

    Raises:
        error: it cannot be opened.
    """
    try:
        files.refuse_special(file, file.stat())  # a named pipe would wait
        handle: AbstractContextManager[Any] = safe_open(file, framework="np")
    except (OSError, SafetensorError) as reason:
        raise error(f"{file} cannot be opened as safetensors ({reason}); fetch or make it again") from reason
    return handle


class Weights:
    """The tensors of safetensors files in one place, by name; safetensors opens them and gives values.

    Bytes are compared as they lie in the files: numpy has no name for some dtypes.
    """

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        """Open the files.

        Raises:
            BadCheckpoint: one cannot be opened.
        """
        self._handles: dict[str, Any] = {}
        self._places: dict[
            str, tuple[Path, int, dict[str, Any]]
        ] = {}  # file, where its data begins, entry in the header
        self.metadata: dict[str, dict[str, str]] = {}  # of each file's header, by the file's name
        for path in paths:
            handle = stack.enter_context(opened(path, BadCheckpoint))
            self._handles.update(dict.fromkeys(handle.keys(), handle))
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length))
            self.metadata[path.name] = entries.pop("__metadata__", None) or {}  # null is none, for safetensors too
            self._places.update({name: (path, 8 + length, entry) for name, entry in entries.items()})

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._places[name][2]["shape"])

    def dtype(self, name: str) -> str:
        """The dtype of a tensor by its name in the header."""
        return str(self._places[name][2]["dtype"])

    def nbytes(self, name: str) -> int:
        """Size of a tensor's data in bytes."""
        start, end = self._places[name][2]["data_offsets"]
        return int(end - start)

    def same(self, other: Weights, name: str) -> bool:
        """True where a tensor has the same dtype, shape and bytes in both; read in blocks."""
        ours, theirs = (side._places[name][2] for side in (self, other))
        alike = (ours["dtype"], ours["shape"]) == (theirs["dtype"], theirs["shape"])
        return alike and all(one == two for one, two in zip(self._blocks(name), other._blocks(name), strict=True))

    def _blocks(self, name: str) -> Iterator[bytes]:
        path, data, entry = self._places[name]
        start, end = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(data + start)
            for at in range(start, end, BLOCK):
                yield file.read(min(BLOCK, end - at))

    def tensor(self, name: str) -> Array:
        """The whole tensor in its own dtype."""
        return np.asarray(self._handles[name].get_tensor(name))

    def rows(self, name: str, rows: npt.NDArray[np.int64]) -> Array:
        """Some rows of a matrix in its own dtype."""
        part = self._handles[name].get_slice(name)
        return np.concatenate([np.asarray(part[int(row) : int(row) + 1]) for row in rows])


def weight_files(root: Path, component: str) -> list[Path]:
    """The safetensors files of a file, a component folder or a pipeline's component; those that a fuse would change.

    Raises:
        BadCheckpoint: there are none, or see `repository_files.sort_files`.
    """
    if root.is_file():
        return [root]
    folder = component if (root / repository_files.MODEL_INDEX).is_file() else ""
    return [root / name for name in repository_files.sort_folder(root, folder).shards]


def row_blocks(name: str, total: int, rows: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Rows to measure, the same in every run: all in blocks, or the first, the last and some that the name draws."""
    if rows is None or rows >= total:
        yield from np.array_split(np.arange(total), math.ceil(total / 256))
        return
    drawn = np.random.default_rng(zlib.crc32(name.encode())).choice(total, size=rows, replace=False)
    yield np.unique(np.concatenate([drawn[: max(rows - 2, 0)], [0, total - 1]]))


def drawn_rows(seed: int, name: str, total: int, rows: int, but: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """So many more rows, which nobody knows who does not know the seed."""
    others = np.setdiff1d(np.arange(total), but)
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(draw.choice(others, size=min(rows, len(others)), replace=False))
