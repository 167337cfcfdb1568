"""Whole files: opened if they are regular and no link leads out, hashed as they are, replaced whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Literal, TypeVar

from lora_fuse.machine.hashing import Advance, feed

# Other rooms know them by this module.
from lora_fuse.machine.parsing import check_yaml as check_yaml  # noqa: PLC0414
from lora_fuse.machine.parsing import parse_json as parse_json  # noqa: PLC0414
from lora_fuse.machine.parsing import parse_yaml as parse_yaml  # noqa: PLC0414

Content = TypeVar("Content")
Untouched = Literal["auto", "reflink", "hardlink", "copy"]
FICLONE = 0x40049409  # linux/fs.h
WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
MOST = 100_000_000  # bytes of a file that is read whole, as of a safetensors header; a large vocabulary has 40 million
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
CACHED = ("blobs", "snapshots")  # in the Hub client's folder of a repository, ``models--OWNER--NAME``


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its size in bytes and the sha256 of its content (lower-case hex)."""

    size: int
    sha256: str


def hash_file(path: Path, advance: Advance = lambda _: None) -> FileRecord:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        feed(file, [digest], advance)
        return FileRecord(os.fstat(file.fileno()).st_size, digest.hexdigest())


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read from it; nothing else is opened, as a named pipe waits and a device has no end.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    refuse_special(path, path.stat())
    return os.fdopen(_open_regular(path, os.O_RDONLY), "rb")


def _open_regular(path: Path, flags: int) -> int:
    """The descriptor of a regular file; it is looked at once it is open, since what a name means can change."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        refuse_special(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def refuse_special(path: Path, info: os.stat_result) -> None:
    """Refuse what is no regular file, by what `stat` says of it.

    Raises:
        OSError: it is none; `strerror` says what it is.
    """
    if not stat.S_ISREG(info.st_mode):
        kind = SPECIAL.get(stat.S_IFMT(info.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, is none, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"it has {max(size, len(content))} bytes, and at most {most} are read", str(path))
    return content


def read_text(path: Path) -> str:
    """As `read_bytes`, as text.

    Raises:
        OSError: see there, or it is not UTF-8.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"it is not UTF-8: byte {error.start} is none of a text", str(path)) from error


def inside(root: Path, name: str) -> Path:
    """The path of a file below a folder from outside, `name` is its POSIX path; no link leads out of the folder.

    Links within it count as files, and so do those to where the Hub's client keeps its files. A folder right below
    `root` may be a link to anywhere: so people keep a component on another disk. In a git clone it may not, as links
    are there what the author of the repository wrote.

    Raises:
        OSError: a link leads elsewhere; `strerror` names its target.
    """
    path = root / name
    top = root / next(iter(Path(name).parts), "")
    own = [root, *([top] if top != path and not (root / ".git").exists() else [])]
    folders = [os.path.realpath(folder) for folder in own]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(folder) for folder in folders) and not _is_cached(path, target):
        raise OSError(errno.EXDEV, f"a link leads to {target}, out of {root}: copy the file to its place", str(path))
    return path


def _is_cached(path: Path, target: Path) -> bool:
    """True for a link into the Hub client's cache, to a file that really lies there, or in what repositories share."""
    first = Path(os.path.realpath(path.parent), path.readlink() if path.is_symlink() else path.name)
    for above in Path(os.path.realpath(first.parent), first.name).parents:
        if above.parent.name.startswith("models--") and above.name in CACHED:
            return target.is_relative_to(above.parent) or target.is_relative_to(above.parent.parent / "blobs")
    return False


def open_lock(path: Path, *, create: bool = True) -> FileIO:
    """Open a lock file, and make it if it is not there; what is in it stays, and no link is followed.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    return os.fdopen(_open_regular(path, flags), "rb", buffering=0)


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
        content = parse_json(read_text(path))
    except (OSError, ValueError) as reason:
        raise error(f"{path} is not readable JSON ({reason}){ending}") from reason
    if not isinstance(content, kind):
        expected = "mapping" if kind is dict else kind.__name__
        raise error(f"{path} holds a {type(content).__name__}, not a {expected}{ending}")
    return content


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, with text."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Give `path` a new content: a reader, a kill or a power failure at any moment finds the old one or the new one."""
    prepare(path, content).replace(path)
    sync(path.parent)


def prepare(path: Path, content: bytes) -> Path:
    """Write the next content of `path` beside it, to be renamed to it; returns where.

    The name is this process' own, and what another user may have put there is not followed. What processes left there
    that were killed is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _write_new(partial, content)
    sync(partial)
    return partial


def _remove_abandoned(path: Path) -> None:
    name = re.compile(rf"\.{re.escape(path.name)}\.([1-9][0-9]*)\.partial")
    for beside in path.parent.iterdir():
        if (owner := name.fullmatch(beside.name)) is not None and not _is_alive(int(owner[1])):
            with suppress(OSError):  # another user's, or a folder
                beside.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _write_new(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(content)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (fsync(2)); some filesystems know no such folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_all(place: Path) -> None:
    """As `sync`, of a file, or of a folder and all that is below it."""
    below = place.rglob("*") if place.is_dir() else []
    for path in [*below, place]:
        if not path.is_symlink():
            sync(path)


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
            sync(path.parent)

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
        with open_regular(source) as old, tempfile.TemporaryFile(dir=folder) as new:
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
        _write_new(old, bytes(4096))
        if read_only:
            make_read_only(old)
        return take_over(old, new, "auto")
    finally:
        for path in (old, new):
            path.unlink(missing_ok=True)


def _reflink(source: Path, target: Path) -> bool:
    try:
        with open_regular(source) as old, target.open("wb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True
