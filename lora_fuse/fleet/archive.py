"""Small results as bytes: a folder packed on a node, and put in the place of one here, whole or not at all."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from lora_fuse.errors import BadSource
from lora_fuse.machine import files, staging

LARGEST = 2_000_000_000  # bytes of a result
# What zipfile raises on bytes that are none of its own; of an empty name an IndexError.
UNREADABLE = (BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError)


def pack(folder: Path, keeps: Callable[[str], bool] = lambda _: True) -> bytes:
    """The regular files of a folder whose POSIX path is kept; hidden ones stay, which are locks and what is unfinished.

    Raises:
        OSError: one cannot be read.
    """
    packed = BytesIO()
    with ZipFile(packed, "w", ZIP_STORED) as archive:  # pictures are compressed already
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden and keeps(name) and path.is_file() and not path.is_symlink():
                archive.writestr(ZipInfo(name), files.read_bytes(path, LARGEST))
    return packed.getvalue()


def unpack(content: bytes, out: Path, *, stays: Iterable[str] = ()) -> None:
    """Put what was packed in the place of `out` at once, see `staging.whole`; `zipfile` lets no name lead out of it.

    Raises:
        Busy: another process holds `out`.
        BadSource: it is not whole, or would be larger than anything that is packed.
        OSError: it cannot be written.
    """
    with staging.exclusive(out), staging.whole(out, stays=stays) as folder, _opened(content) as archive:
        if (size := sum(one.file_size for one in archive.infolist())) > LARGEST:
            raise BadSource(f"the result for {out} has {size} bytes, and at most {LARGEST} come back; run again")
        archive.extractall(folder)


def read(content: bytes, name: str) -> bytes | None:
    """One file of what was packed; None if there is none of that name.

    Raises:
        BadSource: it is not whole.
    """
    with _opened(content) as archive:
        return archive.read(name) if name in archive.namelist() else None


@contextmanager
def _opened(content: bytes) -> Iterator[ZipFile]:
    try:
        with ZipFile(BytesIO(content)) as archive:
            yield archive
    except UNREADABLE as error:
        raise BadSource(f"a result that came back is not whole ({error}); run again") from error
