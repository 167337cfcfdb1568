"""A folder in which a merge is prepared until it takes the place of the last one: whole, at once, even if it is killed.

Beside ``out`` lies a hidden folder, named after everything that its bytes depend on. A run that is killed leaves it,
and the next one with the same inputs goes on with the files that are finished there.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_fuse.errors import Busy, ConnectionLost, Refused
from lora_fuse.machine.files import FileRecord, hash_file, open_lock, read_json, replace_text, sync, sync_all
from lora_fuse.machine.hashing import Advance, in_threads

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fcntl.h, linux/fs.h
PRIVATE = 0o700  # mode of a staging folder
ANEW = "0" * 16  # key of what no run goes on with
PREVIOUS = "previous"  # in a staging folder: the last result, while the next one takes its place in two steps


@dataclass(frozen=True, slots=True)
class StagingFolder:
    """A folder with `files`, which will be the result, and a mark for each of them that is finished."""

    folder: Path

    @property
    def files(self) -> Path:
        """The folder in which files lie as they will below ``out``."""
        return self.folder / "files"

    def place(self, name: str) -> Path:
        """The path to write a file to; its folder is made."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str, record: FileRecord) -> None:
        """Mark a file as whole."""
        replace_text(self._mark(name), json.dumps(asdict(record)))

    def keep_finished(self, names: Iterable[str], advance: Advance = lambda _: None) -> dict[str, FileRecord]:
        """Keep the files that an earlier run finished and that still have their hash; remove all others.

        `advance` is told of the bytes that are kept.
        """
        marked = {name: record for name in names if (record := self._marked(name)) is not None}

        def is_whole(name: str, told: Advance) -> bool:
            with suppress(OSError):
                if hash_file(self.files / name, lambda _: told(0)) == marked[name]:
                    told(marked[name].size)
                    return True
            return False

        whole = in_threads(is_whole, list(marked), advance, lambda name: marked[name].size)
        kept = {name: marked[name] for name, is_kept in zip(marked, whole, strict=True) if is_kept}
        for path in self.files.rglob("*"):
            if not path.is_dir() and path.relative_to(self.files).as_posix() not in kept:
                path.unlink()
        return kept

    def _marked(self, name: str) -> FileRecord | None:
        try:
            record = FileRecord(**read_json(self._mark(name), dict, OSError))
            return record if (self.files / name).stat().st_size == record.size else None
        except (OSError, TypeError):
            return None

    def _mark(self, name: str) -> Path:
        return self.folder / "done" / f"{name}.json"


@contextmanager
def staging_folder(out: Path, key: str) -> Iterator[StagingFolder]:
    """Hold `out`, a folder or file, and prepare its next content; `key` is a hash of all that the bytes depend on.

    Files that an error leaves are removed, those that a kill or a lost connection leaves are kept: nobody else can have
    put them there, as the folder is closed to others, and one of another user is not gone on with.

    Raises:
        Busy: another process holds it.
        Refused: its lock cannot be opened.
        OSError: nothing can be prepared beside it.
    """
    with exclusive(out), _prepared(out, key) as mine:
        yield mine


@contextmanager
def whole(out: Path, *, stays: Iterable[str] = ()) -> Iterator[Path]:
    """Prepare all of the next content of a folder that the caller holds, in an empty one that takes its place at once.

    After an error or a kill `out` is as it was, and so it is until the end. Names in `stays` are taken along.

    Raises:
        OSError: nothing can be prepared beside it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _prepared(out, ANEW) as mine:
        remove(mine.files)
        mine.files.mkdir()
        yield mine.files
        for name in stays:
            if (out / name).exists():
                (out / name).rename(mine.files / name)
        replace_atomically(mine.files, out)


@contextmanager
def _prepared(out: Path, key: str) -> Iterator[StagingFolder]:
    mine = StagingFolder(out.parent / f".{out.name}.partial-{key[:16]}")
    for folder in _staging_folders(out):
        previous = folder / PREVIOUS
        if previous.exists() and not out.exists():  # a swap in two steps was killed between them
            previous.rename(out)
        remove(previous)
        if folder != mine.folder:
            remove(folder)
    try:
        if not _is_own(mine.folder):
            remove(mine.folder)
            mine.folder.mkdir(PRIVATE)
        with suppress(OSError):  # a filesystem without modes
            mine.folder.chmod(PRIVATE)
        mine.files.mkdir(exist_ok=True)
        yield mine
    except ConnectionLost:
        raise
    except Exception:
        remove(mine.folder)
        raise
    with suppress(OSError):  # what was replaced may be another user's; the next run tries again
        remove(mine.folder)


def _staging_folders(out: Path) -> list[Path]:
    """The staging folders that earlier runs left of `out`: by name and content, as others may begin their names so."""
    name = re.compile(rf"\.{re.escape(out.name)}\.partial-[0-9a-f]{{16}}")
    here = [path for path in out.parent.iterdir() if name.fullmatch(path.name) and _is_own(path)]
    return [path for path in here if {part.name for part in path.iterdir()} <= {"files", "done", PREVIOUS}]


def _is_own(folder: Path) -> bool:
    """True for a folder of this user's, which is no link."""
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()


def exclusive(out: Path) -> AbstractContextManager[None]:
    """Hold `out` alone. Only processes that ask here are kept out; the lock of a killed one is free at once.

    Raises:
        Busy: another process holds it.
        Refused: the lock file cannot be opened, or is a link or a named pipe.
    """
    return _locked(out.parent / f".{out.name}.lock", out)


def holding(folder: Path) -> AbstractContextManager[None]:
    """Hold a folder of several results alone, as `exclusive` does with one."""
    return _locked(folder / ".lock", folder)


@contextmanager
def _locked(path: Path, result: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open_lock(path)
    except OSError as error:
        raise Refused(
            f"the lock {path} cannot be opened ({error.strerror}); it has to be a file that you may write, and no link"
        ) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another run is writing {result}; wait for it to end") from error
        yield


def replace_atomically(new: Path, out: Path) -> None:
    """Put `new` in the place of `out`; where the system can, they change names at once, and `new` is the old one.

    All of `new` is on the disk before, so that a power failure leaves one or the other as well.
    """
    sync_all(new)
    if not out.is_dir():
        new.replace(out)
    elif not _exchange(new, out):
        previous = new.with_name(PREVIOUS)
        out.rename(previous)  # a folder cannot be renamed over another, so the old one steps aside first
        new.rename(out)
        remove(previous)
    sync(out.parent)


def _exchange(new: Path, out: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE: Linux, and not on every filesystem."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(out), RENAME_EXCHANGE) == 0)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
