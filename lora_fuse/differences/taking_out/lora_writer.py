"""A LoRA file that is written tensor by tensor, before it is known how many there will be.

Tensors go to a file beside the result, and behind the header in the end; the result takes its place at once, whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Header, dtypes, read_header
from lora_fuse.errors import BadCheckpoint, Refused
from lora_fuse.machine import FileRecord, direct_io, staging

EXTRACTED = "lora_fuse.extracted"  # the metadata entry of an extracted LoRA: of what, and what is left, as JSON
BLOCK = 8 << 20  # bytes that are copied at once
NAMES = {np.dtype(dtypes.DTYPES[name].numpy): name for name in dtypes.OUTPUTS.values()}
ENDING = ".safetensors"


class LoraWriter:
    """Takes tensors; `finish` puts the header before them, and wide ones before narrow ones: each is aligned."""

    def __init__(self, folder: Path, place: Path) -> None:
        self._folder = folder
        self._place = place
        self._spools: dict[int, BinaryIO] = {}  # by bytes of a value
        self._tensors: dict[int, list[tuple[str, str, tuple[int, ...], int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self._spools.values():
            spool.close()

    def add(self, name: str, values: npt.NDArray[np.generic]) -> None:
        """Take a tensor, float32 or of 16 bits."""
        data = np.ascontiguousarray(values)
        width = data.dtype.itemsize
        if width not in self._spools:
            self._spools[width] = (self._folder / f"tensors-{width}").open("w+b")
        self._spools[width].write(data.reshape(-1).view(np.uint8).data)
        self._tensors.setdefault(width, []).append((name, NAMES[data.dtype], values.shape, data.nbytes))

    def finish(self, entry: Mapping[str, object]) -> FileRecord:
        """Write the file, with an entry that says what it is."""
        entries: dict[str, dict[str, object]] = {}
        at = 0
        widths = sorted(self._tensors, reverse=True)
        for name, dtype, shape, nbytes in (tensor for width in widths for tensor in self._tensors[width]):
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        metadata = {"format": "pt", EXTRACTED: json.dumps(entry, sort_keys=True)}
        with direct_io.HashingWriter(self._place, lambda _: None, direct=False) as output:
            output.append(Header.pack(entries, metadata))
            for spool in (self._spools[width] for width in widths):
                spool.seek(0)
                while block := spool.read(BLOCK):
                    output.append(block)
            return output.finish()


@contextmanager
def lora_writer(out: Path, *, replace: bool = False) -> Iterator[tuple[LoraWriter, Path]]:
    """Hold the place of a LoRA, and yield what writes it, and where it lies until it is whole: after an error nowhere.

    `replace` is of whatever is there, but for a folder.

    Raises:
        Refused: something is there that was not extracted here, or nothing can be written there.
        Busy: another process is writing the same file.
    """
    refuse_foreign(out, replace=replace)
    try:
        with staging.staging_folder(out, staging.ANEW) as staged:
            staged.keep_finished([])
            new = staged.place(out.name)
            with LoraWriter(staged.files, new) as writer:
                yield writer, new
            staging.replace_atomically(new, out)
    except OSError as error:
        raise Refused(f"cannot write {out}: {error.strerror} ({error.filename or out}); it is as it was") from error


def refuse_foreign(out: Path, *, replace: bool) -> None:
    """Refuse a place that is not to be written.

    Raises:
        Refused: it has another ending than `ENDING`, is a folder, or is a file that was not extracted here and is not
            to be replaced.
    """
    if out.suffix != ENDING:
        raise Refused(f"OUT {out} would be a LoRA, which is a {ENDING} file; name it {out.with_suffix(ENDING).name}")
    if out.is_dir():
        raise Refused(f"OUT {out} is a folder; name a file in it, {out / 'lora.safetensors'}")
    if out.exists() and not replace and not _is_extracted(out):
        raise Refused(
            f"OUT {out} is a file that lora-fuse did not extract; name another OUT, or replace it all the same with "
            "--replace"
        )


def _is_extracted(path: Path) -> bool:
    try:
        return EXTRACTED in read_header(path).metadata
    except BadCheckpoint:
        return False
