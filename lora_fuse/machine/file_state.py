"""The state of a file, by which it is known without reading it whether it still is what was hashed.

A program that writes to a file can set the time of its last change back, and cannot do so with `ctime`; another file of
the same name has another inode. A disk that rots changes neither: only hashing sees that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_fuse.errors import Busy, Refused
from lora_fuse.machine import staging
from lora_fuse.machine.files import FileRecord, open_regular, read_json, replace_text

# Other rooms know them by this module.
from lora_fuse.machine.hashing import Advance as Advance  # noqa: PLC0414
from lora_fuse.machine.hashing import HashingThreads as HashingThreads  # noqa: PLC0414
from lora_fuse.machine.hashing import feed
from lora_fuse.machine.hashing import in_order as in_order  # noqa: PLC0414
from lora_fuse.machine.hashing import in_threads as in_threads  # noqa: PLC0414

TICK = 20_000_000  # nanoseconds; two changes within one step of the kernel's clock have the same time
Note = Callable[[Path, "FileState", FileRecord], None]  # told of each file that was hashed, and in what state it was


@dataclass(frozen=True, slots=True)
class FileState:
    """All that `stat` says of the content of a file, through links; times in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileState:
        """The state that `stat` or `fstat` gave."""
        return cls(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_dev)

    def is_but_for_ctime(self, other: FileState) -> bool:
        """True where nothing but `ctime` may differ, as after a link to the file was made or removed."""
        return replace(self, ctime_ns=other.ctime_ns) == other


class FileStates:
    """The states of files that have to stay as they are while they are read.

    Where nothing but `ctime` moved, as when another run links to a file of the same base, the file is hashed again if
    it is known what it has to be.
    """

    def __init__(self) -> None:
        self._states: dict[Path, FileState] = {}
        self._records: dict[Path, FileRecord] = {}

    def __getitem__(self, path: Path) -> FileState:
        """The state of a file that was added."""
        return self._states[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._states)

    def add(self, path: Path, state: FileState, record: FileRecord | None = None) -> None:
        """Have a file stay in a state, or in the one that it was added with before; its record is what it has to be."""
        self._states.setdefault(path, state)
        if record is not None:
            self._records.setdefault(path, record)

    def changed(self, paths: Iterable[Path] | None = None) -> list[Path]:
        """The files, of all or of some, that are not as they were, or not there."""
        return [path for path in (self if paths is None else paths) if not self._is_as_it_was(path)]

    def _is_as_it_was(self, path: Path) -> bool:
        before = self._states.get(path)
        now = state_of(path)
        record = self._records.get(path)
        if now is None or before is None or record is None or not now.is_but_for_ctime(before):
            return now == before
        if now != before:
            with suppress(OSError):
                if hash_steady(path, lambda _: None) == (record, now):
                    self._states[path] = now
        return self._states[path] == now

    @contextmanager
    def linking(self, paths: Collection[Path] | None = None) -> Iterator[None]:
        """Within it links to some files, or to all, are made or removed here: that moves `ctime`, and changes nothing.

        One that was not as it should be before stays changed.
        """
        same = set(self if paths is None else paths) - set(self.changed(paths))
        yield
        for path in same & self._states.keys():
            now = state_of(path)
            if now is not None and now.is_but_for_ctime(self._states[path]):
                self._states[path] = now


def state_of(path: Path) -> FileState | None:
    """The state of a file now; None where there is none."""
    try:
        return FileState.of(path.stat())
    except OSError:
        return None


def hash_steady(path: Path, advance: Advance, *digests: Any) -> tuple[FileRecord, FileState]:
    """Hash a regular file that nobody writes to meanwhile; `digests` are further hashes to feed.

    Raises:
        OSError: it cannot be read, or somebody does.
    """
    sha256 = hashlib.sha256()
    with open_regular(path) as file:
        before = FileState.of(os.fstat(file.fileno()))
        feed(file, [sha256, *digests], advance)
        if FileState.of(os.fstat(file.fileno())) != before:
            raise OSError(errno.EBUSY, "it changed while it was read", str(path))
    return FileRecord(before.size, sha256.hexdigest()), before


class SeenFiles:
    """The files that were hashed on this machine, each with its sha256 and the state that it was in.

    They are kept in a file which is of this machine alone: paths are whole, and states mean nothing elsewhere. One that
    cannot be read is an empty one, and one that cannot be written is not: then files are hashed again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _read(path)
        self._new: dict[str, object] = {}

    def knows(self, file: Path, state: FileState, record: FileRecord) -> bool:
        """True where a file in this state was hashed, and that gave this record."""
        key = str(file.resolve())
        return (self._new.get(key) or self._seen.get(key)) == _entry(state, record)

    def note(self, file: Path, state: FileState, record: FileRecord) -> None:
        """Take down a file that was hashed in a state; not if it changed just now, as another change would not show."""
        key = str(file.resolve())
        if time.time_ns() - state.ctime_ns > TICK and self._seen.get(key) != _entry(state, record):
            self._new[key] = _entry(state, record)

    def write(self) -> None:
        """Keep what is new for later runs, and forget files that are not there any more."""
        if not self._new:
            return
        with suppress(OSError, Refused, Busy), staging.exclusive(self._path):
            seen = {name: entry for name, entry in (_read(self._path) | self._new).items() if Path(name).exists()}
            replace_text(self._path, json.dumps(seen, indent=1) + "\n")


def _entry(state: FileState, record: FileRecord) -> dict[str, object]:
    return {**asdict(state), **asdict(record)}


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json(path, dict, OSError)
    except OSError:
        return {}
