"""Whole files: hashed as they are, replaced whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

Content = TypeVar("Content")
Untouched = Literal["auto", "reflink", "hardlink", "copy"]
FICLONE = 0x40049409  # linux/fs.h
WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its size in bytes and the sha256 of its content (lower-case hex)."""

    size: int
    sha256: str


def hash_file(path: Path) -> FileRecord:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def nearest_folder(path: Path) -> Path:
    """The folder that `path` is, or the nearest one above that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def as_text(name: str) -> str:
    r"""A file's name as text can hold it: what is not UTF-8 on disk is escaped, ``\x83\x89``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_text(name: str) -> bool:
    """False for a name that text, and so JSON, cannot hold."""
    return name == as_text(name)


def total_size(place: Path) -> int:
    """Bytes of a file, or of all the files in a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.is_file())


def read_json(path: Path, kind: type[Content], error: Callable[[str], Exception], remedy: str = "") -> Content:
    """Read a JSON file that holds a `kind`, ``dict`` or ``list``.

    Raises:
        error: the file cannot be read, is not JSON or holds something else; made of a message that ends with `remedy`.
    """
    ending = f"; {remedy}" if remedy else ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is not readable JSON ({reason}){ending}") from reason
    if not isinstance(content, kind):
        expected = "mapping" if kind is dict else kind.__name__
        raise error(f"{path} holds a {type(content).__name__}, not a {expected}{ending}")
    return content


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, with text."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Give `path` a new content: a reader, or a kill at any moment, finds the old one or the new one."""
    prepare(path, content).replace(path)


def prepare(path: Path, content: bytes) -> Path:
    """Write the next content of `path` beside it, to be renamed to it; returns where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    return partial


def take_over(source: Path, target: Path, how: Untouched) -> Untouched:
    """Make `target`, which is not there yet, a file with the content of `source`, which is no link; return how.

    ``reflink`` shares blocks until one side is written (btrfs, XFS and others), ``hardlink`` is the same file under two
    names, ``copy`` shares nothing; ``auto`` is the first of them that the filesystem can do, a hard link only of what
    is read-only: who edits one name edits both. What it cannot do becomes a copy.
    """
    if how in ("auto", "reflink") and _reflink(source, target):
        return "reflink"
    if how == "hardlink" or (how == "auto" and is_read_only(source)):
        with suppress(OSError):  # another filesystem, or one without links
            os.link(source, target)
            return "hardlink"
    shutil.copyfile(source, target)
    return "copy"


@contextmanager
def prepared(texts: Mapping[Path, str]) -> Iterator[Callable[[], None]]:
    """Write the next contents of some files, and yield the function that puts them in their places; or leave nothing.

    Raises:
        OSError: one of them cannot be written; all are as they were.
    """
    partials: dict[Path, Path] = {}

    def put() -> None:
        for path, partial in partials.items():
            partial.replace(path)

    try:
        for path, text in texts.items():
            partials[path] = prepare(path, text.encode())
        yield put
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def is_read_only(path: Path) -> bool:
    """True where nobody has the right to write to a file, by its mode."""
    return path.stat().st_mode & WRITE == 0


def make_read_only(path: Path) -> None:
    """Take the right to write to a file from everybody, under all its names.

    Raises:
        OSError: it is another user's.
    """
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~WRITE)


def can_reflink(source: Path, folder: Path) -> bool:
    """Try out whether a folder can share blocks with a file; nothing of it stays."""
    try:
        with source.open("rb") as old, tempfile.TemporaryFile(dir=folder) as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
    except OSError:
        return False
    return True


def link_between(source: Path, target: Path, *, read_only: bool) -> Untouched:
    """Try out how files of one folder can be taken over into another, with a file of one block that is removed again.

    `read_only` says that the files are, or may be made so.

    Raises:
        OSError: one of the folders cannot be written.
    """
    old = source / f".probe-{os.getpid()}"
    new = target / f".probe-{os.getpid()}.new"
    try:
        old.write_bytes(bytes(4096))
        if read_only:
            make_read_only(old)
        return take_over(old, new, "auto")
    finally:
        for path in (old, new):
            path.unlink(missing_ok=True)


def _reflink(source: Path, target: Path) -> bool:
    try:
        with source.open("rb") as old, target.open("wb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True
